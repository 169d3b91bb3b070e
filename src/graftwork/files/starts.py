"""What a reader of PEFT's files has to compute for itself, kept in a file of its own beside them.

It is what LoRAs began from where data decided it (CorDA, LoRA-GA), which is taken away again beside
the base weight and which no reader could compute; and what others draw from a seed, which another
version of torch may draw otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..engine.adapter import Adapter, Part
from ..methods.lora import LoRA
from . import codec
from .codec import Owned

KEYS = {"A": "lora_A0", "B": "lora_B0"}  # factor -> the name of what it began as


class Begun(Part):
    """What one LoRA began from, as a part of a file."""

    def __init__(self, lora: LoRA) -> None:
        super().__init__()
        self.lora = lora

    def file_tensors(self) -> dict[str, Tensor]:
        found = {KEYS["A"]: self.lora.A0, KEYS["B"]: self.lora.B0}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def expects(self, config: Any) -> dict[str, tuple[int, ...]]:
        shapes = self.lora.expects(config)
        return {key: shapes[self.lora.keys[factor]] for factor, key in KEYS.items()}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        if tensors.keys() == set(KEYS.values()):
            self.lora.take_away(*(tensors[key] for key in KEYS.values()))


class Drawn(Part):
    """What one adapter has drawn from a seed, as a part of a file."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def file_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self.adapter, name) for name in self.adapter.drawn}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        for name, mine in self.file_tensors().items():
            if name in tensors:
                mine.copy_(tensors[name])


def _parts(owned: list[Owned]) -> list[Owned]:
    found = []
    for o in owned:
        if isinstance(o.part, LoRA) and o.part.begins.data:
            found.append(Owned(Begun(o.part), o.front, o.config))
        elif isinstance(o.part, Adapter) and o.part.drawn:
            found.append(Owned(Drawn(o.part), o.front, o.config))
    return found


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What is kept of an adapter beside PEFT's file, by the names there; mostly nothing."""
    return {
        codec.full(o.front + key): tensor
        for o in _parts(codec.owned(model, name))
        for key, tensor in o.part.file_tensors().items()
    }


def fill(
    owned: list[Owned],
    tensors: Mapping[str, Tensor],
    key_mapping: Mapping[str, str] | None,
    where: str,
    strict: bool,
) -> None:
    """Give the parts what ``state`` has kept; nothing is changed where it does not fit.

    Raises:
        FileError: a tensor is missing, unexpected or of another shape.
    """
    if tensors:
        nothing, parts = nn.Module(), _parts(owned)  # no tensor of the base may stand there
        report, found = codec.compare(nothing, parts, tensors, key_mapping)
        codec.judge(report, where, strict)
        codec.fill(nothing, parts, tensors, found)
