"""Random tensors that a reader of a file must draw again exactly as PEFT does: on the CPU, from a
seed, in one order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..engine import Shared


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator(device="cpu").manual_seed(seed)


def kaiming(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors from U(-b, b), b = sqrt(6 / fan in), one after the other from one generator."""
    drawn, out = generator(seed), []
    for shape in shapes:
        bound = math.sqrt(6 / math.prod(shape[1:]))
        new = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=drawn)
        out.append(new.to(torch.get_default_device()))
    return out


class Frozen(Shared):
    """Tensors that all layers share and that do not train, such as random projections.

    Args:
        keys: tensor name here -> its name in a PEFT file.
        saved: whether they are in the file; else a reader draws them again.
        **tensors: their values.
    """

    A: Tensor
    B: Tensor

    def __init__(self, keys: dict[str, str], saved: bool, **tensors: Tensor) -> None:
        super().__init__()
        self.keys = keys
        for name, value in tensors.items():
            setattr(self, name, nn.Buffer(value, persistent=saved))


@lru_cache(maxsize=8)  # many layers have the same shape, and a permutation takes long
def _first(seed: int | None, total: int, n: int) -> tuple[int, ...]:
    drawn = torch.Generator(device="cpu") if seed is None else generator(seed)
    return tuple(torch.randperm(total, generator=drawn, device="cpu")[:n].tolist())


def positions(seed: int | None, total: int, n: int) -> Tensor:
    """``n`` different numbers below ``total``, the first of a random order."""
    return torch.tensor(_first(seed, total, n), dtype=torch.int64)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, torch's own generators for the CPU and this device begin at a seed."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
