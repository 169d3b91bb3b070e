"""RandLoRA (arXiv 2502.00987): W + s sum_n B_n diag(l_n) A diag(g_n), of full rank; A and the B_n
random, frozen, shared by all layers. Transposed where the layer is wider than tall; s = alpha / r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Shared, Site
from ..fields import probability, whole
from ..inits.drawn import Frozen
from .bases import bases, drawn_bases


@dataclass
class RandLoraConfig(TargetConfig, method="RANDLORA", peft="fan bias save layers"):
    """A full-rank update: a sum of random low-rank bases, each with learned diagonals."""

    r: int = whole(32)  # rank of one base; the smaller, the more bases and the more is trained
    projection_prng_key: int = 0  # seed of the bases
    save_projection: bool = True  # False: a reader draws them again from the seed
    sparse: bool = False  # bases of -1, 0 and 1, a third of them not 0
    very_sparse: bool = False  # the same with 1 / sqrt(smaller side) of them not 0
    randlora_dropout: float = probability(0.0)  # probability, on the input, in training
    randlora_alpha: int = 640  # the update is scaled by alpha / r
    init_weights: bool = True  # False: l is normal, so the start is not the base

    def share(self, sites: Sequence[Site]) -> Shared:
        sides = [max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True)]
        return drawn_bases(self, min(sides), max(sides))


def diagonals(a: Tensor, l: Tensor, g: Tensor) -> Tensor:  # noqa: E741
    """diag(l_n) A diag(g_n) for all n, (..., r, bases, smaller side)."""
    return l[..., None] * a * g[..., None, :, :]


class Lean(torch.autograd.Function):
    """``diagonals``; backward keeps none of the products, each as large as the weight."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        ctx.save_for_backward(*args)
        return diagonals(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        a, l, g = ctx.saved_tensors  # noqa: E741
        grad = grads[0] * a
        return None, (grad * g[..., None, :, :]).sum(-1), (grad * l[..., None]).sum(-3)


class RandLoRA(LowRank, config=RandLoraConfig):
    """l (..., r, bases) and g (..., bases, smaller side); l is zero at the start."""

    keys = {"l": "randlora_lambda", "g": "randlora_gamma"}
    stacked = True

    def __init__(self, config: RandLoraConfig, site: Site, shared: Frozen) -> None:
        super().__init__(config, site, shared)
        if config.r != (r := len(shared.A)):
            raise ValueError(f"r={config.r} at {site.path}: all layers share bases with r={r}")
        self.small, self.large = sorted(site.shape)
        self.wide, self.r = site.shape[1] > site.shape[0], self.small
        n = bases(self.small, config.r)
        self.l = nn.Parameter(torch.empty(*site.lead, config.r, n))
        self.g = nn.Parameter(torch.empty(*site.lead, n, self.small))
        self.scale, self.zero = config.randlora_alpha / config.r, config.init_weights
        self.dropout = nn.Dropout(config.randlora_dropout)

    def start(self, site: Site) -> None:
        self.l.zero_() if self.zero else self.l.normal_()
        self.g.fill_(1 / (max(self.g.shape[-2:]) if self.zero else self.large))

    def factors(self) -> tuple[Tensor, Tensor]:
        compiled = torch.compiler.is_compiling()  # a compiler drops the products by itself
        product: Any = diagonals if compiled else Lean.apply
        a = product(self.shared.A[..., : self.small], self.scale * self.l, self.g).flatten(-3, -2)
        b = self.shared.B[: self.large, : self.l.shape[-1]].flatten(1)  # bases first, as in PEFT
        return (b.mT, a.mT) if self.wide else (a, b)

    def file_tensors(self) -> dict[str, Tensor]:
        """PEFT writes the bases at every layer too."""
        return {**super().file_tensors(), **self.shared.file_tensors()}
