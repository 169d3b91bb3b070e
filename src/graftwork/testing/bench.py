"""A bench: models of one layer with adapters on it, and the movements that laws make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
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


@dataclass
class Bench:
    """One or more configs at one kind of layer.

    Args:
        kind: a key of ``layers.KINDS``.
        configs: one for each adapter; a config's targets are those of the kind.
        call: arguments of every call of the model, such as task ids for four rows.
    """

    kind: str
    configs: Sequence[PeftConfig]
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def at(self) -> Kind:
        """The kind of layer."""
        return KINDS[self.kind]

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
        return One(self.at.layer()).to(dtype).eval()

    def model(
        self,
        jiggle: float = 0.1,
        dtype: torch.dtype = torch.float32,
        active: Sequence[str] = ("a0",),
    ) -> Any:
        """The model with the adapters a0, a1, ..., moved away from the start."""
        model: Any = PeftModel(self.base(dtype), self.config(), "a0")
        for i in range(1, len(self.configs)):
            model.add_adapter(f"a{i}", self.config(i))
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
        rows: slice = slice(None),
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Any:
        """The model's output for some rows of the input."""
        call = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.call.items()}
        return model(self.x(dtype)[rows], **call, **options)

    def forbids(self, capability: str) -> str:
        """Why mathematics forbids a capability to one of the adapters; empty where it does not."""
        parts = [part for host in self.model(0).base_model.hosts().values() for n in host.adapters
                 for _, part in host.parts_of(n)]  # fmt: skip
        return next((part.FORBIDS[capability] for part in parts if capability in part.FORBIDS), "")
