"""LoRA (arXiv 2106.09685): W + s B A, A (r, in), B (out, r), s = alpha / r; rsLoRA: / sqrt(r)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftType, beyond, check_probability, check_rank
from ..engine.adapter import Adapter, LowRank
from ..engine.host import Beneath
from ..engine.site import Embedding, Site, as_factors
from ..inits import start_of
from . import defaults
from .absent import AbsentLoraOptions


@dataclass
class LoraConfig(AbsentLoraOptions):
    """Low-rank adaptation; also DoRA (``use_dora``) and rsLoRA (``use_rslora``)."""

    r: int = 8  # rank
    lora_alpha: float = 8  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # probability, on the input of A, in training
    use_rslora: bool = False
    init_lora_weights: bool | str = True  # or a name in inits.STARTS: "gaussian", "pissa", ...
    rank_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: r there}
    alpha_pattern: Any = field(default_factory=dict)  # the same for lora_alpha
    use_dora: bool = False
    lora_bias: bool = False  # B has a bias
    ensure_weight_tying: bool = False  # an adapter on a tied weight acts at both ends

    METHOD = PeftType.LORA
    BEYOND = beyond("exclude fan bias save layers target_parameters trainable_token_indices")
    PATTERNS: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    TARGETS = defaults.LORA

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = (self.rank_pattern or {}).values() if "rank_pattern" in self.PATTERNS else ()
        for r in (self.r, *ranks):
            check_rank(r, "r")
        check_probability(self.lora_dropout, "lora_dropout")

    def adapter(self) -> type[Adapter]:
        from .dora import DoRA

        return DoRA if self.use_dora else LoRA


LINEAR_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}
EMBEDDING_KEYS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


class LoRA(LowRank):
    """B A beside the layer; at the start A is random and B zero, at an embedding vice versa."""

    keys: ClassVar[dict[str, str]] = LINEAR_KEYS
    linear: ClassVar[str] = "B"
    stacked = True
    A0: Tensor | None  # factors of a start that is taken away again: training begins at W
    B0: Tensor | None

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.A, self.B = (nn.Parameter(torch.empty(n)) for n in site.factor_shapes(config.r))
        self.bias = nn.Parameter(torch.zeros(site.shape[0])) if config.lora_bias else None
        self.register_buffer("A0", None, persistent=False)
        self.register_buffer("B0", None, persistent=False)
        self.r, self.lead, self.start_name = config.r, site.lead, config.init_lora_weights
        self.scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if isinstance(site, Embedding):
            self.keys = EMBEDDING_KEYS  # type: ignore[misc]
            if config.lora_bias:
                raise ValueError(f"lora_bias has no meaning at the embedding {site.path}")

    def derive(self, site: Site) -> None:
        start = start_of(self.start_name, site)
        if start.subtract:
            a, b = start.factors(self, site)
            self.A0, self.B0 = a.to(self.A), b.to(self.B)

    def start(self, site: Site) -> None:
        a, b = self.A0, self.B0
        if a is None or b is None:
            a, b = start_of(self.start_name, site).factors(self, site)
        self.A.copy_(a)
        self.B.copy_(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = as_factors(self.A, self.B, self.lead)
        if self.A0 is not None and self.B0 is not None:
            a0, b0 = as_factors(self.A0, self.B0, self.lead)
            a, b = torch.cat([a, a0], dim=-2), torch.cat([b, -b0], dim=-1)
        return a, self.scale * b

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, b = super().fold(w, b)
        return w, b if self.bias is None else self.scale * self.bias + (0 if b is None else b)

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        y = super().forward(x, layer)
        return y if self.bias is None else y + layer.site.outputs(self.scale * self.bias)

    def tied_tensors(self, transposed: bool) -> dict[str, Tensor]:
        if not transposed:
            return self.file_tensors()
        other = LINEAR_KEYS if "lora_embedding_A" in self.keys.values() else EMBEDDING_KEYS
        return {other["A"]: self.B.mT, other["B"]: self.A.mT}
