"""The random bases of RandLoRA, drawn on the CPU from a seed exactly as PEFT draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..inits.drawn import Frozen, generator

if TYPE_CHECKING:
    from .randlora import RandLoraConfig


def drawn_bases(config: RandLoraConfig, small: int, large: int) -> Frozen:
    """A (r, 1, smaller side) and B (larger side, bases, r), each of unit variance."""
    drawn, r, n = generator(config.projection_prng_key), config.r, bases(small, config.r)
    if config.sparse or config.very_sparse:
        share = small**-0.5 if config.very_sparse else 1 / 3
        a, b = (ternary(shape, share, drawn) for shape in ((r, 1, small), (large, n, r)))
    else:
        a = uniform((r, 1, small), small**-0.5, drawn)
        b = torch.cat([uniform((large, 1, r), r**-0.5, drawn) for _ in range(n)], dim=1)
    a, b = ((t / t.std()).to(torch.get_default_device(), torch.float32) for t in (a, b))
    return Frozen({"A": "randlora_A", "B": "randlora_B"}, config.save_projection, A=a, B=b)


def bases(small: int, r: int) -> int:
    """How many bases of rank r make full rank."""
    return -(-small // r)


def uniform(shape: tuple[int, ...], bound: float, drawn: torch.Generator) -> Tensor:
    """Uniform between -bound and bound, in bf16."""
    new = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return new.uniform_(-bound, bound, generator=drawn)


def ternary(shape: tuple[int, ...], share: float, drawn: torch.Generator) -> Tensor:
    """-1 and 1, each with the probability share / 2, and 0."""
    p = torch.rand(shape, generator=drawn, device="cpu")
    return (p > 1 - share / 2).float() - (p < share / 2).float()
