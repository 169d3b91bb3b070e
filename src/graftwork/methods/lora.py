"""LoRA (arXiv 2106.09685): W + s B A, A (r, in), B (out, r), s = alpha / r; rsLoRA: / sqrt(r)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import Embedding, LowRank, Site
from ..engine.site import as_factors
from ..inits import start_of
from ..inits.noted import WAITING
from .lora_config import LoraConfig

LINEAR_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}
EMBEDDING_KEYS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


class LoRA(LowRank):
    """B A beside the layer; at the start A is random and B zero, at an embedding vice versa."""

    keys = LINEAR_KEYS
    linear = "B"
    stacked = True
    A0: Tensor | None  # factors of a start that is taken away again: training begins at W
    B0: Tensor | None

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.A, self.B = (nn.Parameter(torch.empty(n)) for n in site.factor_shapes(config.r))
        self.bias = nn.Parameter(torch.zeros(site.shape[0])) if config.lora_bias else None
        self.register_buffer("A0", None, persistent=False)
        self.register_buffer("B0", None, persistent=False)
        self.r, self.site, self.lead = config.r, site, site.lead
        self.start_name, self.loftq_config = config.init_lora_weights, config.loftq_config
        self.begins = start_of(self.start_name, site)
        self.scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if isinstance(site, Embedding):
            self.keys = EMBEDDING_KEYS
            if config.lora_bias:
                raise ValueError(f"lora_bias has no meaning at the embedding {site.path}")

    def derive(self, site: Site) -> None:
        if self.begins.subtract and not self.begins.data:
            self.take_away(*(self.begins.taken or self.begins.factors)(self, site))

    def take_away(self, a: Tensor, b: Tensor) -> None:
        self.A0, self.B0 = a.to(self.A), b.to(self.B)

    def need_data(self) -> None:
        """Begin as the user's data have it, unless a file has said how."""
        if self.begins.data and self.A0 is None:
            self.take_away(*self.begins.factors(self, self.site))

    def start(self, site: Site) -> None:
        self.need_data()
        a, b = self.A0, self.B0
        if a is None or b is None or self.begins.taken is not None:
            a, b = self.begins.factors(self, site)
        self.A.copy_(a)
        self.B.copy_(b)

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        super().take(tensors, config)
        self.need_data()
        WAITING.discard(self)

    def leaves(self) -> tuple[Tensor, Tensor, float | Tensor]:
        a, b = as_factors(self.A, self.B, self.lead)
        if self.A0 is not None and self.B0 is not None:
            a0, b0 = as_factors(self.A0, self.B0, self.lead)
            a, b = torch.cat([a, a0], dim=-2), torch.cat([b, -b0], dim=-1)
        return a, b, self.scaler

    def shift(self) -> Tensor | None:
        return None if self.bias is None else self.scaler * self.bias

    def pad(self, rank: int) -> None:
        """Make room for another adapter of a higher rank: directions that are zero, in no file."""
        a, b = as_factors(self.A, self.B, self.lead)
        more = max(0, rank - a.shape[-2])
        a, b = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))
        for old, new in zip((self.A, self.B), self.site.from_factors(a, b), strict=True):
            old.data = new.detach()

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = super().file_tensors()
        a, b = as_factors(self.A, self.B, self.lead)
        if a.shape[-2] > self.r:
            a, b = self.site.from_factors(a[..., : self.r, :], b[..., : self.r])
            tensors |= {self.keys["A"]: a, self.keys["B"]: b}
        return tensors

    def tied_tensors(self, transposed: bool) -> dict[str, Tensor]:
        if not transposed:
            return self.file_tensors()
        other = LINEAR_KEYS if "lora_embedding_A" in self.keys.values() else EMBEDDING_KEYS
        return {other["A"]: self.B.mT, other["B"]: self.A.mT}


def fixed_rank(part: LoRA, rank: int) -> None:
    """Instead of ``pad``, where other tensors than A and B depend on the rank."""
    if rank > part.r:
        raise ValueError(
            f"the {type(part).__name__} at {part.site.path} has r={part.r}, and room for {rank} "
            "can be made in plain LoRA only; use target_rank=None, or train it with that rank"
        )
