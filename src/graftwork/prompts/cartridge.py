"""Cartridges (arXiv 2506.06266): softmax(q [P_k; K]') [P_v; V] in every attention. P_k and P_v are
those of a text at first (``initialize_kv_prefix_from_text``) and are trained, but for the first
rows, to which attention goes that is about nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fields import checked
from .keys import Table
from .prefix import PrefixConfig


class Cartridge(Table):
    """E (trained, layers x 2 x width) behind frozen rows of the same width."""

    frozen: Tensor

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__(config)
        first = config.num_frozen_tokens
        self.register_buffer("frozen", self.E.detach()[:first].clone())
        self.E = nn.Parameter(self.E.detach()[first:].clone())

    def start(self) -> None:
        with torch.device("cpu"):  # drawn as PEFT does
            for rows in (self.frozen, self.E):
                rows.copy_(torch.empty(rows.shape).normal_())

    def whole(self) -> Tensor:
        return torch.cat([self.frozen, self.E])

    def put(self, values: Tensor) -> None:
        self.frozen.copy_(values[: len(self.frozen)])
        self.E.copy_(values[len(self.frozen) :])


def _count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number from 0 on, not {value!r}")


@dataclass
class CartridgeConfig(PrefixConfig, method="CARTRIDGE"):
    """Trained keys and values of a text, the first ones frozen."""

    num_frozen_tokens: int = checked(1, _count)  # how many of the virtual tokens never train

    TABLE = Cartridge

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens > self.n:
            raise ValueError(
                f"num_frozen_tokens={self.num_frozen_tokens} of num_virtual_tokens={self.n}: there "
                "are not that many"
            )
