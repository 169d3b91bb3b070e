"""What OFT, BOFT and HRA have in common: y = W R' x + b, that is W' = W R', with R orthogonal.

The inputs of an embedding are ids, which cannot be turned: there W' = R' W, the outputs are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine import Adapter, Beneath, Embedding, Site
from ..fast import blocks


class Rotation(Adapter):
    """A method that says how vectors of n numbers are turned."""

    def __init__(self, config: Any, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.outwards = isinstance(site, Embedding)
        self.n = site.shape[0 if self.outwards else 1]

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """x R for x (..., n); ``back``: x R'."""
        raise NotImplementedError

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(w.mT).mT if self.outwards else self.turn(w, back=True), b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if self.outwards:
            return self.turn(layer(x))
        if layer.site.pointwise and x.is_floating_point():
            return layer(self.turn(x))
        return super().forward(x, layer)


def times_blocks(x: Tensor, r: Tensor) -> Tensor:
    """x times a block diagonal matrix: x (..., blocks k), r (blocks, k, k)."""
    return blocks(x, r.to(x.dtype))


def cayley(q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1, orthogonal for a skew Q (..., k, k)."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    rotation: Tensor = torch.linalg.solve(one + q, one - q, left=False)
    return rotation


def neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2Q + ... + 2Q^(m-1) + Q^m, m = terms - 1 but at least 3; for two terms I + 2Q."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    p = 2 * one + (q if terms > 2 else 0)
    for _ in range(max(terms - 3, 1) if terms > 2 else 0):
        p = 2 * one + q @ p
    return one + q @ p


def left_out(r: Tensor, p: float) -> Tensor:
    """r (..., k, k) with the identity in place of some blocks, each with probability p."""
    one = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return torch.where(torch.rand(r.shape[:-2], device=r.device)[..., None, None] < p, one, r)
