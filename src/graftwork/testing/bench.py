"""A bench: models of one layer with adapters on it, and the movements that laws make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..engine import Adapter
from ..engine.inject import switch_of as injected
from ..model.functional import inject_adapter_in_model, set_adapter, user_model
from ..model.peft_model import PeftModel
from .layers import KINDS, Kind, One

TOLERANCE = 1e-5


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    """The law's equality: within rounding."""
    torch.testing.assert_close(a, b, rtol=tolerance * 10, atol=tolerance)


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.1, seed: int = 1) -> None:
    """Move every trainable number away from the start."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad and p.is_floating_point():
            p.add_((torch.randn(p.shape, generator=generator) * size).to(p.dtype))


def parts_of(model: PeftModel, *names: str) -> list[Adapter]:
    """What stands at a model's layers, of these adapters or of all."""
    every = model.base_model.hosts().values()
    return [part for h in every for n in names or h.adapters for _, part in h.parts_of(n)]


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Setup:
    """What a method needs around its adapters, such as data to start from.

    Args:
        before: called with a model, a config and an input, before an adapter of the config is
            attached or loaded; it may complete the config.
        after: called with the model, the name of a new adapter and an input.
    """

    before: Callable[[nn.Module, Any, Tensor], None] = _nothing
    after: Callable[[nn.Module, str, Tensor], None] = _nothing

    def attach(self, model: Any, config: Any, name: str, x: Tensor) -> Any:
        """The model with one more adapter, a ``PeftModel``."""
        config = deepcopy(config)
        self.before(user_model(model), config, x)
        if _adapted(model):
            model = PeftModel.around(user_model(model))
            model.add_adapter(name, config)
        else:
            model = PeftModel(model, config, name)
        self.after(model, name, x)
        return model

    def inject(self, model: nn.Module, config: Any, name: str, x: Tensor) -> nn.Module:
        """The model with one more adapter, which is active, without a wrapper."""
        config = deepcopy(config)
        self.before(model, config, x)
        inject_adapter_in_model(config, model, name)
        set_adapter(model, name)
        self.after(model, name, x)
        return model

    def load(self, model: Any, folder: str, name: str, x: Tensor, **options: Any) -> Any:
        """The model with a saved adapter, which is active, a ``PeftModel``."""
        self.before(model, PeftConfig.from_pretrained(folder), x)
        if not _adapted(model):
            return PeftModel.from_pretrained(model, folder, adapter_name=name, **options)
        model = PeftModel.around(model)
        model.load_adapter(folder, name, **options)
        model.set_adapter(name)
        return model.eval()


def _adapted(model: nn.Module) -> bool:
    return injected(user_model(model)) is not None


@dataclass
class Bench:
    """One or more configs at one kind of layer.

    Args:
        kind: a key of ``layers.KINDS``, or a kind of one's own.
        configs: one for each adapter; a config's targets are those of the kind.
        call: arguments of every call of the model, such as task ids for four rows.
        setups: one for each config, where some need any.
    """

    kind: str | Kind
    configs: Sequence[PeftConfig]
    call: Mapping[str, Any] = field(default_factory=dict)
    setups: Sequence[Setup] = ()

    @property
    def at(self) -> Kind:
        """The kind of layer."""
        return KINDS[self.kind] if isinstance(self.kind, str) else self.kind

    def setup(self, index: int = 0) -> Setup:
        """What a config needs around its adapters."""
        return self.setups[index] if self.setups else Setup()

    def config(self, index: int = 0) -> Any:
        """A config with its targets."""
        config = deepcopy(self.configs[index])
        for name, value in self.at.fields.items():
            setattr(config, name, deepcopy(value))
        for name in getattr(config, "SUBSETS", ()):
            if getattr(config, name):  # "some of the adapted layers" are all of them here
                setattr(config, name, deepcopy(self.at.fields["target_modules"]))
        return config

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        """The bare model, always with the same weights."""
        torch.manual_seed(0)
        layer = self.at.layer()
        return (layer if self.at.whole else One(layer)).to(dtype).eval()

    def model(
        self,
        jiggle: float = 0.1,
        dtype: torch.dtype = torch.float32,
        active: Sequence[str] = ("a0",),
    ) -> Any:
        """The model with the adapters a0, a1, ..., moved away from the start."""
        model = self.base(dtype)
        for i in range(len(self.configs)):
            model = self.setup(i).attach(model, self.config(i), f"a{i}", self.x(dtype))
        if jiggle:
            model.set_requires_grad([f"a{i}" for i in range(len(self.configs))])
            shake(model, jiggle)
        model.set_adapter(list(active))
        return model

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The input."""
        return self.at.x.to(dtype) if self.at.x.is_floating_point() else self.at.x

    def run(
        self,
        model: Any,
        rows: Any = slice(None),
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Any:
        """The model's output for some rows of the input, a slice or a list."""
        call = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.call.items()}
        return model(self.x(dtype)[rows], **call, **options)

    def forbids(self, capability: str) -> str:
        """Why mathematics forbids a capability to one of the adapters; empty where it does not."""
        parts = parts_of(self.model(0))
        return next((part.FORBIDS[capability] for part in parts if capability in part.FORBIDS), "")
