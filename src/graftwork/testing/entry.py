"""What a row of the matrix is measured on: a config, and a small model of two blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model import functional
from ..model.peft_model import PeftModel
from .bench import Bench, shake

IDS = torch.tensor([[1, 3, 3, 7], [0, 11, 2, 5], [4, 9, 1, 1], [3, 2, 6, 8]])


class Block(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return y


class Small(nn.Module):
    """An embedding, two blocks, and an output layer that may be tied to the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        y: Tensor = self.head(x)
        return y


@dataclass(frozen=True)
class Entry:
    """A row of the matrix.

    Args:
        config: builds a config without targets, small enough for 6 to 12 channels.
        kinds: the kinds of layers at which the method has a meaning.
        call: arguments of every call, for four rows.
        other: a second config of the method that can be active beside the first.
    """

    config: Callable[[], Any]
    kinds: Sequence[str]
    call: Mapping[str, Any] = field(default_factory=dict)
    other: Callable[[], Any] | None = None

    def bench(self, kind: str, *more: Any) -> Bench:
        """The method alone, or below others, at a kind of layer."""
        return Bench(kind, [self.config(), *more], self.call)

    @property
    def kind(self) -> str:
        """Where capabilities that do not depend on the layer are tried."""
        return "linear" if "linear" in self.kinds else self.kinds[0]

    @property
    def second(self) -> Any:
        """Another config of the method."""
        return (self.other or self.config)()

    def at(self, targets: Sequence[str] = (), **options: Any) -> Any:
        """The config for ``Small``."""
        config = self.config()
        own = ("up", "down") if "linear" in self.kinds else ("embed",)
        config.target_modules = set(targets or own)
        for name in getattr(config, "SUBSETS", ()):
            if getattr(config, name):
                setattr(config, name, set(config.target_modules))
        for name, value in options.items():
            setattr(config, name, value)
        return config

    def small(self, config: Any = None, tied: bool = False) -> Any:
        """``Small`` with the method, moved away from the start."""
        model: Any = PeftModel(Small(tied).eval(), config or self.at(), "a0")
        shake(model)
        return model.eval()

    def run(self, model: Any) -> Tensor:
        """The output of ``Small``, wrapped or with injected adapters."""
        with torch.no_grad():
            if isinstance(model, PeftModel):
                y: Tensor = model(IDS, **self.call)
                return y
            with functional.using(model, **self.call):
                return model(IDS)  # type: ignore[no-any-return]
