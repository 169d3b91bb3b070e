"""VeLoRA (arXiv 2405.17991): LoRA; for the gradient of A each input is kept as its products with
one direction v, x ~ c (x_g . v) v in every group g of features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..engine import Site
from .lora import LoRA
from .lora_config import LoraConfig


class VeLoRA(LoRA):
    """v (in / groups,), kept in files. Where the layer does not act position by position (a
    convolution, an embedding, a weight that is only folded) the gradient is exact.
    """

    products_in = (False,)

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.options, self.averaged = config.velora_config, False
        self.keys = {**self.keys, "v": "lora_velora_embed"}
        self.v = nn.Buffer(torch.zeros(-(-site.shape[1] // self.options.num_groups)))

    def start(self, site: Site) -> None:
        super().start(site)
        if self.options.init_type == "random":
            self.v.copy_(unit(torch.randn_like(self.v)))

    def branch(self, x: Tensor, site: Site) -> Tensor:
        learns = self.training and torch.is_grad_enabled()
        if not learns or not site.pointwise or not x.is_floating_point():
            return super().branch(x, site)
        self.observe(x)
        a, b = self.factors()
        h: Tensor = Compressed.apply(x, a, self.v.clone(), self.options)  # type: ignore[no-untyped-call]
        return site.expand(h, b)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """The direction of a batch: the mean over its positions and groups."""
        how = self.options.init_type
        if how == "batch_average" or (how == "batch_average_once" and not self.averaged):
            self.v.copy_(unit(grouped(x, self.options.num_groups).mean((0, 1))))
            self.averaged = True


class Compressed(torch.autograd.Function):
    """x A' whose backward remembers x by (positions, groups) numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, options: Any) -> Tensor:
        ctx.shape, ctx.scale = x.shape, options.scale
        ctx.save_for_backward(grouped(x, options.num_groups) @ v.to(x.dtype), a, v)
        return F.linear(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        kept, a, v = ctx.saved_tensors
        x = (kept[..., None] * v.to(kept.dtype)).flatten(1)[:, : ctx.shape[-1]] * ctx.scale
        to_x = (g @ a).reshape(ctx.shape) if ctx.needs_input_grad[0] else None
        to_a = g.flatten(0, -2).mT @ x if ctx.needs_input_grad[1] else None
        return to_x, to_a, None, None


def grouped(x: Tensor, groups: int) -> Tensor:
    """(..., in) -> (positions, groups, in / groups), zeros behind."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)


def unit(v: Tensor) -> Tensor:
    """v / ||v||; where v is zero, the direction of all ones."""
    norm = v.norm()
    return torch.where(norm > 0, v / norm, torch.full_like(v, len(v) ** -0.5))
