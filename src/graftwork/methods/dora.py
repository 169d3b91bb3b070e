"""DoRA (arXiv 2402.09353): W' = m (W + s B A) / ||W + s B A|| by rows, the norm held constant."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..engine.host import Beneath
from ..engine.site import Site
from .lora import LoRA, LoraConfig


class DoRA(LoRA):
    """LoRA whose rows are rescaled to learned norms m (out,)."""

    keys: ClassVar[dict[str, str]] = {**LoRA.keys, "m": "lora_magnitude_vector"}

    def __init__(self, config: LoraConfig, site: Site) -> None:
        super().__init__(config, site)
        if config.lora_bias:
            raise ValueError("DoRA has no lora_bias; leave one of the two out")
        self.keys = {**self.keys, "m": "lora_magnitude_vector"}  # type: ignore[misc]
        self.m = nn.Parameter(torch.empty(site.channel_shape()))

    def start(self, site: Site) -> None:
        super().start(site)
        self.m.copy_(self.norm(site.weight.to(self.m.dtype)).reshape(self.m.shape))

    def norm(self, w: Tensor) -> Tensor:
        return (w + self.delta()).norm(dim=-1)  # (..., out)

    def gain(self, w: Tensor) -> Tensor:
        norm = self.norm(w).detach()  # section 4.3: no gradient through the norm
        return self.m.reshape(norm.shape) / norm

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.gain(w)[..., None] * (w + self.delta()), b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        w, b = layer.weights()
        bias = 0 if b is None else layer.site.outputs(b)
        return (
            layer.site.outputs(self.gain(w)) * (layer(x) - bias + self.branch(x, layer.site)) + bias
        )

    def forward_transposed(self, x: Tensor, layer: Beneath) -> Tensor:
        w, b = layer.weights()
        return layer.site.apply(x, self.fold(w.mT, None)[0].mT, b)

    def delta_norm(self, w: Tensor) -> float:
        return float((self.fold(w, None)[0] - w).norm())
