"""LoKr (arXiv 2309.14859): W + s kron(W1, W2), s = alpha / r; W1 and W2 may be products of rank r,
W2 of a kernel also T x A x B."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Additive, Site
from ..fields import choice, probability, whole


@dataclass
class LoKrConfig(TargetConfig, method="LOKR", peft="exclude layers save"):
    """A Kronecker product of two small matrices."""

    rank_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: r there}
    alpha_pattern: Any = field(default_factory=dict)  # the same for alpha
    r: int = whole(8)  # rank of W2; W2 is whole where r is at least half of its larger side
    alpha: float = 8  # the update is scaled by alpha / r
    rank_dropout: float = probability(0.0)  # probability that a row is left out in training
    module_dropout: float = probability(0.0)  # probability that the adapter is left out in training
    use_effective_conv2d: bool = False  # T, A, B at kernels larger than one
    decompose_both: bool = False  # W1 is a product of rank r too, where that is smaller
    decompose_factor: int = whole(-1)  # size of W1; -1: near the root of the layer's
    rank_dropout_scale: bool = False  # whether the rows that rank_dropout leaves make up for it
    init_weights: Any = choice(True, False, "lycoris")  # W1 starts at 0; "lycoris": W2

    PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha"}


def split(n: int, factor: int = -1) -> tuple[int, int]:
    """n as a product: ``factor`` first, or the largest divisor below it and below sqrt(n)."""
    if factor < 0 or n % factor:
        top = min(math.isqrt(n), n if factor < 0 else factor)
        factor = max(d for d in range(1, top + 1) if n % d == 0)
    return factor, n // factor


class LoKr(Additive, config=LoKrConfig):
    """W1 (o1, i1), W2 (o2, i2, *kernel), or Ai (oi, r) and Bi (r, ii), flat; T (r, r, *kernel)."""

    keys = {
        "W1": "lokr_w1", "A1": "lokr_w1_a", "B1": "lokr_w1_b",
        "W2": "lokr_w2", "A2": "lokr_w2_a", "B2": "lokr_w2_b", "T": "lokr_t2",
    }  # fmt: skip
    T: Tensor | None

    def __init__(self, config: LoKrConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (channels, *kernel), r = site.in_shape, config.r
        (o1, o2), (i1, i2) = (split(n, config.decompose_factor) for n in (site.shape[0], channels))
        shapes: dict[str, tuple[int, ...]] = {"W1": (o1, i1)}
        if config.decompose_both and r < max(o1, i1) / 2:
            shapes = {"A1": (o1, r), "B1": (r, i1)}
        if r >= max(o2, i2) / 2:
            shapes |= {"W2": (o2, i2, *kernel)}
        elif config.use_effective_conv2d and any(k > 1 for k in kernel):
            two = (*kernel, 1)[: max(2, len(kernel))]  # PEFT's T has two such axes at least
            shapes |= {"A2": (r, o2), "B2": (r, i2), "T": (r, r, *two)}
        else:
            shapes |= {"A2": (o2, r), "B2": (r, i2 * math.prod(kernel))}
        for name in self.keys:
            new = nn.Parameter(torch.empty(shapes[name])) if name in shapes else None
            self.register_parameter(name, new)
        self.shape, self.sizes, self.scale = site.shape, (i1, i2), config.alpha / r
        self.skip, self.start_name = config.module_dropout, config.init_weights
        self.row_dropout, self.rescale = config.rank_dropout, config.rank_dropout_scale

    def start(self, site: Site) -> None:
        zero = {True: ("W1", "A1"), "lycoris": ("W2", "B2")}.get(self.start_name, ())
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if name in zero else nn.init.kaiming_uniform_(p, a=5**0.5)

    def factor(self, i: int) -> Tensor:
        """W1 or W2."""
        a, b, whole = (getattr(self, f"{name}{i}") for name in "ABW")
        if i == 2 and self.T is not None:
            return torch.einsum("ij...,ip,jq->pq...", self.T, a, b)
        return a @ b if whole is None else whole  # type: ignore[no-any-return]

    def delta(self) -> Tensor:
        w1, w2 = self.factor(1), self.factor(2)
        w2 = w2 if w2.ndim == 3 else w2.flatten(1)  # a whole W2 of a Conv1d has PEFT's own order
        return self.scale * torch.kron(w1, w2).reshape(self.shape)

    def branch(self, x: Tensor, site: Site) -> Tensor:
        if site.pointwise and x.is_floating_point():
            blocks = torch.unflatten(x, -1, self.sizes)  # (..., i1, i2)
            y = self.scale * (self.factor(1) @ (blocks @ self.factor(2).mT)).flatten(-2)
        else:
            y = super().branch(x, site)
        return y * site.outputs(self.kept().to(y)) if self.training and self.row_dropout else y

    def kept(self) -> Tensor:
        """Which rows of the update rank_dropout leaves, (out,)."""
        kept = (torch.rand(self.shape[0]) > self.row_dropout).float()
        return kept / kept.mean().clamp(min=1 / len(kept)) if self.rescale else kept
