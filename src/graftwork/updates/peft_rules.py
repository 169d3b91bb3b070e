"""PEFT's own rules, for ``compat="peft"``: they act on the factors A and B, or on dense updates.

``linear`` adds the factors, so that averaging an adapter with itself doubles it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import StateError
from .factored import Factored
from .sites import Place, Updates


def as_peft(
    found: Sequence[Updates],
    weights: Sequence[float],
    how: str,
    dense: bool,
    density: float | None,
    sign: str,
    rank: int | None,
) -> dict[Place, Factored]:
    """The combination at each place, as PEFT 0.21 makes it.

    Args:
        found: the adapters, LoRAs of one rank unless ``how`` is cat or svd.
        weights: one for each.
        how: linear, cat, svd, ties, dare_linear, dare_ties or magnitude_prune.
        dense: whether the rule acts on the dense updates (PEFT's names that end with ``_svd``).
        density: the share of the numbers that is kept.
        sign: "total" or "frequency".
        rank: of the result, where it comes from an SVD.
    """
    made = {}
    for place in dict.fromkeys(place for one in found for place in one.places):
        here = [(o, w) for o, w in zip(found, weights, strict=True) if place in o.places]
        parts = [(o.places[place], o.scales[place], w) for o, w in here]
        if how == "cat":
            a = torch.cat([u.a * w * s for u, s, w in parts], -2)
            made[place] = Factored(a, torch.cat([u.b / s for u, s, w in parts], -1))
        elif how == "svd" or dense:
            rule = "linear" if how == "svd" else how
            deltas = torch.stack([u.b @ u.a for u, _, _ in parts])
            mixed = _ruled(deltas, [w for *_, w in parts], rule, density, sign)
            u, s, vh = torch.linalg.svd(mixed, full_matrices=False)
            r = rank or max(o.config.r for o in found)
            made[place] = Factored(vh[..., :r, :], u[..., :r] * s[..., None, :r])
        else:
            if len({u.rank for u, _, _ in parts}) > 1:
                raise StateError(f"PEFT's rule {how} needs adapters of one rank; try cat or svd")
            signed = [(w * s, abs(w * s) ** 0.5) for _, s, w in parts]
            left = [root if value >= 0 else -root for value, root in signed]
            a = _ruled(torch.stack([u.a for u, _, _ in parts]), left, how, density, sign)
            raw = torch.stack([u.b / s for u, s, _ in parts])
            made[place] = Factored(a, _ruled(raw, [r for _, r in signed], how, density, sign))
    return made


def _ruled(
    c: Tensor, weights: Sequence[float], how: str, density: float | None, sign: str
) -> Tensor:
    w = torch.tensor(weights).to(c).reshape(-1, *[1] * (c.ndim - 1))
    share = 1.0 if density is None else density
    if how in ("ties", "magnitude_prune"):
        flat = c.flatten(1)
        top = flat.abs().topk(int(share * flat.shape[1]), dim=1).indices
        c = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top)).reshape(c.shape)
    elif how.startswith("dare"):
        c = c * torch.bernoulli(torch.full_like(c, share)) / share
    if not how.endswith("ties"):
        return (c * w).sum(0)
    votes = c.sum(0) if sign == "total" else c.sign().sum(0)
    agrees = c.sign() == torch.where(votes >= 0, 1, -1)
    return (c * w * agrees).sum(0) / agrees.sum(0).clamp(min=1)
