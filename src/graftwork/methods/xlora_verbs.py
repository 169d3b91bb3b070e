"""PEFT's verbs about the scalings of X-LoRA, which the model offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..engine import Shared

if TYPE_CHECKING:
    from .xlora import XLoraConfig

VERBS = frozenset(
    "set_topk_lora set_global_scaling_weight get_global_scaling_weight set_scaling_pass_value "
    "get_latest_scalings get_scalings_log enable_scalings_logging disable_scalings_logging "
    "clear_scalings_log get_bucketed_scalings_log".split()
)


class Verbs(Shared):
    """The scalings of the last forwards, and what may be set between them."""

    def __init__(self, config: XLoraConfig) -> None:
        super().__init__()
        self.config, self.n = config, len(config.adapters)
        self.latest: Tensor | None = None
        self.log: list[Tensor] = []
        self.logging = False
        self.set_topk_lora(config.top_k_lora)

    def set_topk_lora(self, value: int | None) -> None:
        """Use so many experts for each token; None: all."""
        if value is not None and not 1 <= value <= self.n:
            raise ValueError(f"top_k_lora={value} is not between 1 and the {self.n} experts")
        self.config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply the whole update."""
        self.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """What multiplies the whole update."""
        return self.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Every scaling in the first pass; None: one over the number of experts."""
        self.config.scaling_pass_value = 1 / self.n if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """The last scalings, (rows, positions, layers, experts)."""
        return self.latest

    def get_scalings_log(self) -> list[Tensor]:
        """The scalings of each forward since logging was enabled."""
        return list(self.log)

    def enable_scalings_logging(self) -> None:
        """Note the scalings of each forward from now on."""
        self.logging = True

    def disable_scalings_logging(self) -> None:
        """Note no more scalings; those that were noted stay."""
        self.logging = False

    def clear_scalings_log(self) -> None:
        """Forget the scalings that were noted."""
        self.log.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The scalings that were noted and their places in the log, by the number of positions."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, s in enumerate(self.log):
            places, tensors = found.setdefault(s.shape[1], ([], []))
            places.append(i)
            tensors.append(s)
        return found
