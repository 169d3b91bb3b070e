"""LoRA's options: those of the method itself, and of the variants that have files of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..config import TargetConfig
from ..engine import Adapter
from ..fields import check_rank, options, probability, ranges, whole
from ..inits.options import CordaConfig, EvaConfig, LoraGAConfig
from .lora_options import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.root import Grafted

# the option that asks for a variant -> its adapter class
VARIANTS = {
    "use_dora": "dora:DoRA",
    "kasa_config": "kasa:KaSA",
    "use_qalora": "qalora:QALoRA",
    "use_bdlora": "bdlora:BDLoRA",
    "velora_config": "velora:VeLoRA",
    "monteclora_config": "monteclora:MonteCLoRA",
    "alora_invocation_tokens": "alora:ALoRA",
    "arrow_config": "arrow:Arrow",
    "mica": "mica:MiCA",  # a value of init_lora_weights
}
# PEFT's name of a penalty that programs there add by hand -> the option that asks for its variant
PENALTIES = {"_get_kasa_loss": "kasa_config", "_get_monteclora_loss": "monteclora_config"}
RESHAPED = ("use_qalora", "use_bdlora")  # variants whose factors have shapes of their own
PLAIN_STARTS = ("true", "false", "gaussian")


@dataclass
class LoraConfig(TargetConfig, method="LORA", peft="all"):
    """Low-rank adaptation, its starts and its variants, of which an adapter may be one."""

    r: int = 8  # rank
    lora_alpha: float = 8  # the update is scaled by lora_alpha / r
    lora_dropout: float = probability(0.0)  # probability, on the input of A, in training
    use_rslora: bool = False  # the scale is lora_alpha / sqrt(r)
    init_lora_weights: bool | str = True  # or a name in inits.STARTS: "gaussian", "pissa", ...
    rank_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: r there}
    alpha_pattern: Any = field(default_factory=dict)  # the same for lora_alpha
    lora_bias: bool = False  # B has a bias
    ensure_weight_tying: bool = False  # an adapter on a tied weight acts at both ends
    use_dora: bool = False  # DoRA: rows of learned norms
    kasa_config: Any = options(KasaConfig)  # which asks for KaSA
    use_qalora: bool = False  # QALoRA: constant in groups of inputs
    qalora_group_size: int = whole(16)  # inputs that QALoRA pools
    use_bdlora: Any = options(BdLoraConfig)  # which asks for BD-LoRA
    velora_config: Any = options(VeloraConfig)  # which asks for VeLoRA
    monteclora_config: Any = options(MontecloraConfig)  # which asks for MonteCLoRA
    alora_invocation_tokens: list[int] | None = None  # ids from which on aLoRA acts
    arrow_config: Any = options(ArrowConfig)  # of create_arrow_model
    loftq_config: Any = field(default_factory=dict)  # LoftQConfig, of init_lora_weights="loftq"
    eva_config: Any = options(EvaConfig)  # of "eva"
    corda_config: Any = options(CordaConfig)  # of "corda"
    lora_ga_config: Any = options(LoraGAConfig)  # of "lora_ga"
    layer_replication: Sequence[Sequence[int]] | None = ranges(None)  # blocks to run, [start, end)
    megatron_config: dict[str, Any] | None = None  # PEFT's, not here
    megatron_core: str | None = "megatron.core"  # PEFT's
    runtime_config: Any = options(LoraRuntimeConfig)  # PEFT's, not in files

    PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    CONTEXT = ("alora_offsets",)
    LASTS = True
    OFFERS = frozenset(PENALTIES)

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = (self.rank_pattern or {}).values() if "rank_pattern" in self.PATTERNS else ()
        for r in (self.r, *ranks):
            check_rank(r, "r")
        if self.megatron_config:
            raise ValueError(
                "graftwork does not have megatron_config, an option of PEFT's LoRA that changes "
                "what an adapter computes; leave it out, or use PEFT"
            )
        if self.variant in RESHAPED and str(self.init_lora_weights).lower() not in PLAIN_STARTS:
            raise ValueError(
                f"{self.variant} gives A or B another shape, which init_lora_weights="
                f"{self.init_lora_weights!r} does not know; use one of [True, False, 'gaussian']"
            )
        if self.variant and self.ensure_weight_tying:
            raise ValueError(f"{self.variant} has no ensure_weight_tying; leave it out")
        if self.variant and self.ADAPTER:
            raise ValueError(f"{type(self).__name__} has no {self.variant}; leave it out")

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "runtime_config"}

    @property
    def variant(self) -> str | None:
        """The key in VARIANTS of the one that is asked for.

        Raises:
            ValueError: several are, and they exclude each other.
        """
        mica = str(self.init_lora_weights).lower() == "mica"
        asked = [name for name in VARIANTS if getattr(self, name, mica)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} are variants that exclude each other; use one")
        return asked[0] if asked else None

    def adapter(self) -> type[Adapter]:
        if self.ADAPTER:  # of a class that builds on this one
            return super().adapter()
        where = VARIANTS[self.variant] if self.variant else "lora:LoRA"
        module, _, name = where.partition(":")
        found: type[Adapter] = getattr(import_module(f".{module}", __package__), name)
        return found

    def prepares(self) -> bool:
        return self.variant == "alora_invocation_tokens"

    def before(self, root: Grafted, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        from .alora import invoked

        return invoked(self.alora_invocation_tokens or (), args, kwargs)

    def offer(self, root: Grafted, name: str, attribute: str) -> Any:
        from ..interop.helpers import by_hand

        return by_hand(root, PENALTIES[attribute])

    def has_penalty(self) -> bool:
        own = type(self).penalty is not LoraConfig.penalty
        return own or hasattr(self.adapter(), "penalty")

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        own: Any = self.adapter()
        term: Tensor = own.penalty(list(adapters.values()), self)
        return term
