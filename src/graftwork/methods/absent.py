"""Options of PEFT's LoRA that are not here: read from files, refused where they are set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import TargetConfig


@dataclass
class AbsentLoraOptions(TargetConfig):
    """PEFT's options; those of starts (``eva_config`` ...) only note how a file came about."""

    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    runtime_config: Any = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None

    REFUSED: ClassVar[tuple[str, ...]] = (
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
        for name in self.REFUSED:
            if getattr(self, name):
                raise ValueError(
                    f"graftwork does not have {name}, an option of PEFT's LoRA that changes what "
                    "an adapter computes; leave it out, or use PEFT"
                )

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "runtime_config"}
