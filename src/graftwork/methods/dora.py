"""DoRA (arXiv 2402.09353): W' = m (W + s B A) / ||W + s B A|| by rows, the norm held constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine import Adapter, Beneath, Site
from ..fast import row_norms
from .lora import LoRA
from .lora_config import LoraConfig


class DoRA(LoRA):
    """LoRA whose rows are rescaled to learned norms m (out,)."""

    sums = scales = True

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        if config.lora_bias or config.ensure_weight_tying:
            raise ValueError("DoRA has no lora_bias or ensure_weight_tying; leave those out")
        self.keys = {**self.keys, "m": "lora_magnitude_vector"}
        self.m = nn.Parameter(torch.empty(site.channel_shape()))

    def start(self, site: Site) -> None:
        super().start(site)
        self.m.copy_(row_norms(site.weight, *self.factors()).reshape(self.m.shape))

    def multiplier(self, w: Tensor) -> Tensor:
        """m / ||W + s B A|| by rows, (..., out); section 4.3: no gradient through the norm."""
        norm = row_norms(w, *self.factors())
        return self.m.reshape(norm.shape) / norm

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.multiplier(w)[..., None] * (w + self.delta()), b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        w, b = layer.weights()
        bias = 0 if b is None else layer.site.outputs(b)
        update = layer(x) - bias + self.branch(self.dropped(x), layer.site)
        return layer.site.outputs(self.multiplier(w)) * update + bias

    factored = Adapter.factored  # the update depends on the weight
    forward_transposed = Adapter.forward_transposed
    delta_norm = Adapter.delta_norm
