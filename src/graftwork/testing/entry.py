"""What a row of the matrix is measured on: a config, and a small model of two blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model import functional
from ..model.peft_model import PeftModel
from .bench import Bench, Setup, shake
from .layers import Kind, Told

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
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(
        self, ids: Tensor, output_hidden_states: bool = False, return_dict: bool = False
    ) -> Any:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        y: Tensor = self.head(x)
        return Told((x,), y) if output_hidden_states else y


@dataclass(frozen=True)
class Entry:
    """A row of the matrix.

    Args:
        config: builds a config without targets, small enough for 6 to 12 channels.
        kinds: the kinds of layers at which the method has a meaning; none: it follows whole blocks.
        call: arguments of every call, for four rows.
        other: a second config of the method that can be active beside the first.
        setup: what the method needs around its adapters.
        model: builds a model of two blocks in ``layers``; an argument says whether its output layer
            is tied to its embedding, of 12 ids.
        ends: the names of its embedding and its output layer.
    """

    config: Callable[[], Any]
    kinds: Sequence[str]
    call: Mapping[str, Any] = field(default_factory=dict)
    other: Callable[[], Any] | None = None
    setup: Setup = field(default_factory=Setup)
    model: Callable[[bool], nn.Module] = Small
    ends: tuple[str, str] = ("embed", "head")

    def bench(self, kind: str | Kind | None = None) -> Bench:
        """The method alone, by default where what does not depend on the layer is tried."""
        return self._bench(kind or self.kind, (self.config(), self.setup))

    def pair(self) -> Bench:
        """The method twice."""
        second = (self.other or self.config)()
        return self._bench(self.kind, (self.config(), self.setup), (second, self.setup))

    def beside(self, config: Any) -> Bench:
        """The method below another one."""
        return self._bench(self.kind, (self.config(), self.setup), (config, Setup()))

    def _bench(self, kind: str | Kind, *adapters: tuple[Any, Setup]) -> Bench:
        configs, setups = zip(*adapters, strict=True)
        return Bench(kind, configs, self.call, setups)

    @property
    def kind(self) -> str | Kind:
        """Where capabilities that do not depend on the layer are tried."""
        if not self.kinds:
            return Kind(partial(self.model, False), IDS, "a whole model", fields={}, whole=True)
        return "linear" if "linear" in self.kinds else self.kinds[0]

    def at(self, targets: Sequence[str] = (), **options: Any) -> Any:
        """The config for the model of two blocks."""
        config = self.config()
        if targets or self.kinds:
            config.target_modules = set(targets or ("up", "down"))
        for name in getattr(config, "SUBSETS", ()):
            if getattr(config, name):
                setattr(config, name, set(config.target_modules))
        for name, value in options.items():
            setattr(config, name, value)
        return config

    def base(self, tied: bool = False) -> nn.Module:
        """The model of two blocks, always with the same weights."""
        torch.manual_seed(0)
        return self.model(tied).eval()

    def small(self, config: Any = None, tied: bool = False) -> Any:
        """That model with the method, moved away from the start."""
        model = self.setup.attach(self.base(tied), config or self.at(), "a0", IDS)
        model.set_adapter("a0")
        shake(model)
        return model.eval()

    def native(self, **options: Any) -> nn.Module:
        """That model with the method and without a wrapper."""
        return self.setup.inject(self.base(), self.at(**options), "a0", IDS)

    def loaded(self, folder: str, tied: bool = False, **options: Any) -> Any:
        """That model with the method out of a folder that the model was saved to."""
        return self.setup.load(self.base(tied), f"{folder}/a0", "a0", IDS, **options)

    def run(self, model: Any) -> Tensor:
        """The output of that model, bare, wrapped or with injected adapters."""
        with torch.no_grad():
            if isinstance(model, PeftModel):
                y: Tensor = model(IDS, **self.call)
                return y
            with functional.using(model, **self.call):
                return model(IDS)  # type: ignore[no-any-return]
