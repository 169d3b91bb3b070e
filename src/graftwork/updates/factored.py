"""An update of one matrix in factored form, B A: thin QR and a small SVD instead of the product.

Everything is batched over leading axes, such as those of stacked experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-6  # singular values below this share of the largest are rounding
LARGE = 1024  # from this size on, a few directions of a dense matrix are found by iteration


@dataclass(frozen=True)
class Factored:
    """B A with B (..., out, r) and A (..., r, in), and what is added to the bias (out,)."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]

    def __mul__(self, weight: float) -> Factored:
        return Factored(self.a, self.b * weight, None if self.bias is None else self.bias * weight)

    def norm(self) -> Tensor:
        """The Frobenius norm of B A, ``tr((B'B)(AA'))`` under the root; never the product."""
        a, b = self.a.double(), self.b.double()
        return ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt()

    def basis(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., out, k), s (..., k) and V' (..., k, in) of B A."""
        qb, rb = torch.linalg.qr(self.b)
        qa, ra = torch.linalg.qr(self.a.mT)
        u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
        return qb @ u, s, vh @ qa.mT

    def compressed(self, rank: int | None = None, energy: float | None = None) -> Factored:
        """The nearest update of a smaller rank; without arguments, of the rank that it has.

        Args:
            rank: at most so many directions.
            energy: the fewest directions that hold this share of the squared norm.
        """
        u, s, vh = self.basis()
        keep = kept(s, rank, energy)
        root = s[..., :keep].sqrt()
        return Factored(
            root[..., None] * vh[..., :keep, :], u[..., :keep] * root[..., None, :], self.bias
        )

    def padded(self, rank: int) -> Factored:
        """The same update with zero directions up to a rank."""
        more = rank - self.rank
        a = torch.nn.functional.pad(self.a, (0, 0, 0, more))
        return Factored(a, torch.nn.functional.pad(self.b, (0, more)), self.bias)


def kept(s: Tensor, rank: int | None, energy: float | None) -> int:
    """How many of the singular values (..., k) are kept: at least one, none that is rounding."""
    s = s.reshape(-1, s.shape[-1])
    largest = s[:, :1].clamp(min=torch.finfo(s.dtype).tiny)
    count = int((s > ROUNDING * largest).sum(1).max())
    if energy is not None:
        shares = s.square().cumsum(1) / s.square().sum(1, keepdim=True).clamp(min=1e-30)
        count = min(count, 1 + int((shares < energy).sum(1).max()))
    return max(1, min(count, rank or count))


def of_dense(delta: Tensor, rank: int | None = None, energy: float | None = None) -> Factored:
    """The nearest update of a rank to a dense one (..., out, in).

    Args:
        delta: the update.
        rank: at most so many directions; by default as many as it has.
        energy: the fewest directions that hold this share of the squared norm.
    """
    if rank is not None and energy is None and min(delta.shape[-2:]) > LARGE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=min(rank + 16, *delta.shape[-2:]), niter=6)
            vh = v.mT
    else:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    keep = kept(s, rank, energy)
    root = s[..., :keep].sqrt()
    return Factored(root[..., None] * vh[..., :keep, :], u[..., :keep] * root[..., None, :])


def joined(updates: list[Factored]) -> Factored:
    """The sum of updates, as one of the sum of their ranks."""
    biases = [u.bias for u in updates if u.bias is not None]
    return Factored(
        torch.cat([u.a for u in updates], dim=-2),
        torch.cat([u.b for u in updates], dim=-1),
        sum(biases[1:], biases[0]) if biases else None,
    )
