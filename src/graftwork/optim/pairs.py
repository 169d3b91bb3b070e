"""The trained tensors of a model's adapters, and the factors of its LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..engine.adapter import Part
from ..engine.site import Site, as_factors
from ..engine.tree import hosts
from ..methods.lora import LoRA
from ..model.functional import user_model


@dataclass(frozen=True)
class Pair:
    """A LoRA's factors: A (..., r, in) and B (..., out, r), stored as PEFT stores them."""

    part: LoRA
    site: Site

    @property
    def frozen(self) -> nn.Parameter:
        """The factor that is random at the start: A, or B at an embedding."""
        return self.part.B if self.embedding else self.part.A

    @property
    def learned(self) -> nn.Parameter:
        """The factor that is zero at the start."""
        return self.part.A if self.embedding else self.part.B

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.part.keys.values()

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Stored tensors as matrices."""
        return as_factors(a, b, self.part.lead)

    def stored(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices as they are stored."""
        return self.site.from_factors(a, b)


def pairs(model: nn.Module) -> list[Pair]:
    """The LoRAs of a model's adapters that train."""
    found = []
    for host in hosts(user_model(model)).values():
        for name in host.adapters:
            for key, part in host.parts_of(name):
                if isinstance(part, LoRA) and (part.A.requires_grad or part.B.requires_grad):
                    found.append(Pair(part, host.need_site(key)))
    return found


def names_in_files(model: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The tensors of adapters, with the last part of their names in a file."""
    for module in model.modules():
        if isinstance(module, Part):
            for name, parameter in module.named_parameters(recurse=False):
                yield parameter, module.keys.get(name, name)
