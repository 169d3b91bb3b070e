"""LoRA's options: those of the method itself, and of the variants that have files of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import PeftType, beyond, check_probability, check_rank
from ..engine.adapter import Adapter
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
        from .lora import LoRA

        return DoRA if self.use_dora else LoRA
