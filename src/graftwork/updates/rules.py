"""How several changes become one: linear, TIES, DARE, magnitude pruning.

A rule takes the coordinates of each change (adapters, ...), all in one basis, and gives those of
the result. For low-rank updates the basis is that of all of them together: with
``[D1 ... Dn] = U [C1 ... Cn]``, U (out, k) orthonormal, the coordinates of D_i are C_i (k, in), as
in KnOTS (arXiv 2410.19735); no matrix of the weight's size is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, float, str], Tensor]


def linear(c: Tensor, weights: Tensor, density: float, sign: str) -> Tensor:
    """Sum of w_i c_i."""
    return torch.einsum("n,n...->...", weights, c)


def magnitude_prune(c: Tensor, weights: Tensor, density: float, sign: str) -> Tensor:
    """Of each change, the share ``density`` with the largest magnitudes."""
    return linear(_largest(c, density), weights, density, sign)


def dare_linear(c: Tensor, weights: Tensor, density: float, sign: str) -> Tensor:
    """DARE (arXiv 2311.03099): each number is kept with probability ``density`` and rescaled."""
    return linear(_random(c, density), weights, density, sign)


def ties(c: Tensor, weights: Tensor, density: float, sign: str) -> Tensor:
    """TIES (arXiv 2306.01708): trim, elect a sign for each number, average those that agree."""
    return _elected(_largest(c, density), weights, sign)


def dare_ties(c: Tensor, weights: Tensor, density: float, sign: str) -> Tensor:
    """DARE's choice of numbers, then TIES' signs."""
    return _elected(_random(c, density), weights, sign)


RULES: dict[str, Rule] = {
    f.__name__: f for f in (linear, magnitude_prune, dare_linear, ties, dare_ties)
}


def _largest(c: Tensor, density: float) -> Tensor:
    flat = c.flatten(1)
    count = max(1, round(density * flat.shape[1]))
    bar = flat.abs().kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
    return torch.where(flat.abs() >= bar, flat, 0).reshape(c.shape)


def _random(c: Tensor, density: float) -> Tensor:
    return torch.where(torch.rand_like(c) < density, c / density, 0)


def _elected(c: Tensor, weights: Tensor, sign: str) -> Tensor:
    c = torch.einsum("n,n...->n...", weights, c)
    votes = c.sum(0) if sign == "total" else c.sign().sum(0)
    agrees = (c.sign() == torch.where(votes >= 0, 1, -1)) & (c != 0)
    return (c * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def coordinates(updates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """U (..., out, k) and C (n, ..., k, in) for updates A (..., r_i, in), B (..., out, r_i).

    U are the left singular vectors of all updates side by side, from a Gram matrix of the size of
    their ranks; so the result does not depend on how each is split into A and B.
    """
    q, r = torch.linalg.qr(torch.cat([b for _, b in updates], dim=-1))
    split = r.split([a.shape[-2] for a, _ in updates], dim=-1)
    inner = [part @ a for part, (a, _) in zip(split, updates, strict=True)]  # (..., R, in)
    gram = sum((c.double() @ c.double().mT for c in inner), torch.zeros((), dtype=torch.double))
    values, vectors = torch.linalg.eigh(gram)
    bar = 1e-12 * values[..., -1:].clamp(min=torch.finfo(torch.double).tiny)
    keep = max(1, int((values > bar).sum(-1).max()))
    u = vectors[..., -keep:].flip(-1).to(q.dtype)
    return q @ u, torch.stack([u.mT @ c for c in inner])
