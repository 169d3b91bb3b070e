"""LN tuning (arXiv 2312.11420): y = module'(x), a trained copy of each norm, or of any module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TargetConfig
from ..engine import Adapter, Host, Shared
from ..errors import TargetError
from ..parts.whole import Copy, whole
from ..targets.defaults import LN_TUNING
from ..targets.offer import Offer, Target, leaf

PREFIX = "ln_tuning_layers."


@dataclass
class LNTuningConfig(TargetConfig, method="LN_TUNING", peft="exclude save"):
    """Whole norms, trained; ``target_modules`` may name modules of any type."""

    def places(self, offer: Offer, path: str) -> list[Target]:
        return [Target(path, offer.modules[path])]

    def usual(self, offer: Offer) -> Any:
        if known := LN_TUNING.get(offer.model_type):
            return {entry for entry in known if offer.ending_with(entry)}
        norms = {leaf(path) for path, m in offer.modules.items() if is_norm(m)}
        if not norms:
            raise TargetError(
                f"{type(offer.model).__name__} has no norm: name modules in target_modules"
            )
        return norms

    def build(self, host: Host, key: str, shared: Shared | None) -> Adapter:
        return whole(host, key, Norm)


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module has vectors for its only parameters, and nothing inside."""
    own = list(module.parameters())
    return bool(own) and not any(True for _ in module.children()) and all(p.ndim == 1 for p in own)


class Norm(Copy, config=LNTuningConfig):
    """The copy, under PEFT's names."""

    def file_tensors(self) -> dict[str, Tensor]:
        return {PREFIX + name: tensor for name, tensor in super().file_tensors().items()}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        super().take({name.removeprefix(PREFIX): t for name, t in tensors.items()}, config)
