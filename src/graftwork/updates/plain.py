"""A LoRA that takes its start away, as a plain one that any reader knows."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..files import codec


def as_plain_lora(
    base: nn.Module, config: PeftConfig, name: str, tensors: dict[str, Tensor]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """A LoRA minus its start, as a plain one: B A - B0 A0 = [B, -B0] [A; A0]."""
    if config.method != "LORA" or getattr(config, "variant", None):
        raise ValueError(
            "only a LoRA can be written as a plain LoRA; leave "
            "path_initial_model_for_weight_conversion out"
        )
    double, out = copy(config), dict(tensors)
    for o in codec.owned(base, name):
        a0, b0 = getattr(o.part, "A0", None), getattr(o.part, "B0", None)
        if a0 is None or b0 is None:
            continue
        keys = [codec.PREFIX + o.front + o.part.keys[k] for k in ("A", "B")]
        if len(a0) != len(tensors[keys[0]]):
            raise ValueError(
                f"{name!r} takes away a start of full rank (LoftQ), so it is no plain LoRA of "
                "twice the rank; use save_as_lora, or merge it"
            )
        out[keys[0]] = torch.cat([tensors[keys[0]], a0], dim=0)
        out[keys[1]] = torch.cat([tensors[keys[1]], -b0], dim=1)
    factor = 2**0.5 if double.use_rslora else 2  # type: ignore[attr-defined]
    double.r, double.lora_alpha = double.r * 2, double.lora_alpha * factor  # type: ignore[attr-defined]
    double.rank_pattern = {k: v * 2 for k, v in (double.rank_pattern or {}).items()}  # type: ignore[attr-defined]
    double.alpha_pattern = {k: v * factor for k, v in (double.alpha_pattern or {}).items()}  # type: ignore[attr-defined]
    double.init_lora_weights = True  # type: ignore[attr-defined]
    return double, out
