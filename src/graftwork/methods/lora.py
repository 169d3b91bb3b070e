"""LoRA (arXiv 2106.09685): W + s B A, A (r, in), B (out, r), s = alpha / r; rsLoRA: / sqrt(r)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftType, TargetConfig, check_rank
from ..engine.adapter import Adapter, LowRank
from ..engine.host import Beneath
from ..engine.site import Embedding, Site, as_factors
from ..inits import start_of
from . import defaults


@dataclass
class LoraConfig(TargetConfig):
    """Low-rank adaptation; also DoRA (``use_dora``) and rsLoRA (``use_rslora``)."""

    r: int = 8  # rank
    lora_alpha: float = 8  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # probability, on the input of A, in training
    fan_in_fan_out: bool = (
        False  # PEFT's note that weights are stored transposed; the layer's type decides here
    )
    bias: str = (
        "none"  # biases that are trained too: "none", "all", "lora_only" (of the adapted layers)
    )
    use_rslora: bool = False
    init_lora_weights: bool | str = (
        True  # a name of graftwork.inits, e.g. "gaussian", "orthogonal", "pissa", "olora"
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict
    )  # regex for the end of a path -> r there
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)  # the same for lora_alpha
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = (
        None  # token ids, or {embedding's name: ids}, whose rows are trained
    )
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    runtime_config: Any = None
    lora_bias: bool = False  # B has a bias
    target_parameters: Any = None  # names of bare parameters, such as stacked expert weights
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False  # an adapter on a tied weight acts at both ends

    METHOD = PeftType.LORA
    PATTERNS: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    TARGETS = defaults.LORA
    ELSEWHERE = (
        "megatron_config",
        "velora_config",
        "alora_invocation_tokens",
        "use_qalora",
        "monteclora_config",
        "layer_replication",
        "runtime_config",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for r in (
            (self.r, *(self.rank_pattern or {}).values()) if self.METHOD is PeftType.LORA else ()
        ):
            check_rank(r, "r")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias={self.bias!r} is not known; it is 'none', 'all' or 'lora_only'")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability below 1, not {self.lora_dropout}")
        for name in self.ELSEWHERE:
            if getattr(self, name):
                raise ValueError(
                    f"{type(self).__name__}({name}=...) is an option of PEFT that graftwork does "
                    "not have; "
                    "remove it, or train this adapter with PEFT"
                )

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "runtime_config"}

    def adapter(self) -> type[Adapter]:
        from .dora import DoRA

        return DoRA if self.use_dora else LoRA


class LoRA(LowRank):
    """B A beside the layer; at the start A is random and B zero, at an embedding vice versa."""

    keys: ClassVar[dict[str, str]] = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
    }

    def __init__(self, config: LoraConfig, site: Site) -> None:
        super().__init__(config, site)
        a, b = site.factor_shapes(config.r)
        self.A, self.B = nn.Parameter(torch.empty(a)), nn.Parameter(torch.empty(b))
        (
            self.register_buffer("A0", None, persistent=False),
            self.register_buffer("B0", None, persistent=False),
        )
        self.bias = nn.Parameter(torch.zeros(site.shape[0])) if config.lora_bias else None
        self.r, self.lead, self.how = config.r, site.lead, config.init_lora_weights
        self.scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if isinstance(site, Embedding):
            self.keys = {"A": "lora_embedding_A", "B": "lora_embedding_B"}  # type: ignore[misc]
            if config.lora_bias:
                raise ValueError(
                    f"lora_bias has no meaning at the embedding {site.path}; leave it out"
                )

    A0: (
        Tensor | None
    )  # the factors of a start that is taken away again, so that training begins at W
    B0: Tensor | None

    def derive(self, site: Site) -> None:
        start = start_of(self.how)
        if start.subtract:
            a, b = start.factors(self, site)
            self.A0, self.B0 = a.to(self.A), b.to(self.B)

    def start(self, site: Site) -> None:
        a, b = (self.A0, self.B0) if self.A0 is not None else start_of(self.how).factors(self, site)
        self.A.copy_(a)  # type: ignore[arg-type]
        self.B.copy_(b)  # type: ignore[arg-type]

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

    def rank(self) -> int:
        return self.r
