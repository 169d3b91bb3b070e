"""Random tensors that a reader of a file must draw again exactly as PEFT does: on the CPU, from a
seed, in one order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
