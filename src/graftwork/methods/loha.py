"""LoHa (arXiv 2108.06098): W + s (A1 B1) * (A2 B2), s = alpha / r; at kernels the Tucker form
(T1 x A1 x B1) * (T2 x A2 x B2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Additive, Site
from ..fields import probability, whole


@dataclass
class LoHaConfig(TargetConfig, method="LOHA", peft="exclude layers save"):
    """A Hadamard product of two low-rank matrices: rank up to r^2."""

    r: int = whole(8)  # rank of each of the two
    alpha: float = 8  # the update is scaled by alpha / r
    rank_dropout: float = probability(0.0)  # probability that a row is left out in training
    module_dropout: float = probability(0.0)  # probability that the adapter is left out in training
    use_effective_conv2d: bool = False  # the Tucker form at kernels larger than one
    init_weights: bool = True  # False: the update does not start at zero
    rank_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: r there}
    alpha_pattern: Any = field(default_factory=dict)  # the same for alpha

    PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha"}


class LoHa(Additive, config=LoHaConfig):
    """A (out, r), B (r, in), two of each; in the Tucker form A (r, out), T (r, r, *kernel) too."""

    keys = {
        "A1": "hada_w1_a", "B1": "hada_w1_b", "T1": "hada_t1",
        "A2": "hada_w2_a", "B2": "hada_w2_b", "T2": "hada_t2",
    }  # fmt: skip
    B2: Tensor

    def __init__(self, config: LoHaConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), r = site.shape, config.r
        kernel = site.in_shape[1:]
        self.tucker = config.use_effective_conv2d and any(k > 1 for k in kernel)
        for i in (1, 2):
            a, b = ((r, out), (r, site.in_shape[0])) if self.tucker else ((out, r), (r, in_))
            self.register_parameter(f"A{i}", nn.Parameter(torch.empty(a)))
            self.register_parameter(f"B{i}", nn.Parameter(torch.empty(b)))
            if self.tucker:
                self.register_parameter(f"T{i}", nn.Parameter(torch.empty(r, r, *kernel)))
        self.scale, self.skip = config.alpha / r, config.module_dropout
        self.row_dropout, self.zero = config.rank_dropout, config.init_weights

    def start(self, site: Site) -> None:
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=5**0.5)
        if self.zero:
            self.B2.zero_()

    def factor(self, i: int) -> Tensor:
        """One of the two matrices, (out, in)."""
        a, b = getattr(self, f"A{i}"), getattr(self, f"B{i}")
        if not self.tucker:
            return a @ b  # type: ignore[no-any-return]
        t = getattr(self, f"T{i}")
        return torch.einsum("ij...,jr,ip->pr...", t, b, a).flatten(1)

    def delta(self) -> Tensor:
        return self.scale * self.factor(1) * self.factor(2)

    def branch(self, x: Tensor, site: Site) -> Tensor:
        y = super().branch(x, site)
        if not (self.training and self.row_dropout):
            return y
        kept = torch.rand(site.shape[0]) > self.row_dropout
        return y * site.outputs(kept.to(y))
