"""Dropout by a pool of bits that all layers read, each at an offset of its own.

The masks of a step are windows of one long sequence of independent Bernoulli bits. The sequence is
the same in every process; where a layer's window begins is drawn by torch's generator, so a seed
fixes the masks, gradient checkpointing draws them again, and ranks that are seeded differently have
different ones. Nothing is kept for the backward pass but that number.

What it means: each number of an input is dropped with probability p, and independently of the
others in its window, as with ``nn.Dropout``. Two windows that overlap, of two layers or two steps,
have the same bits at a shift, which is as likely as the windows are many: ``SIZE`` less their
length.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SIZE = {"cpu": 1 << 21, "cuda": 1 << 25}  # numbers in a pool; any other device has the first


@lru_cache(maxsize=8)
def pool(p: float, dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
    """Zeros with probability p and ones, (size,), always the same ones."""
    generator = torch.Generator().manual_seed(2654435769)
    kept = torch.rand(size, generator=generator) >= p
    return kept.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Mask:
    """Which numbers of an input (rows, columns) are kept, by offsets into a pool.

    Args:
        p: the probability that a number is dropped; no number is scaled.
        shape: (rows, columns).
        rows: how many rows share one offset.
        starts: the offsets.
        size: of the pool.
    """

    p: float
    shape: torch.Size
    rows: int
    starts: tuple[int, ...]
    size: int

    @classmethod
    def draw(cls, p: float, x: Tensor, generator: torch.Generator | None = None) -> Mask:
        """A new mask for x (rows, columns), by torch's generator of the CPU or another one."""
        n, columns = x.shape
        size = SIZE.get(x.device.type, SIZE["cpu"])
        while size < 4 * columns:
            size *= 2
        rows = max(1, min(n, size // 2 // max(columns, 1)))
        high = size - rows * columns + 1
        starts = torch.randint(high, (-(-n // rows),), generator=generator, device="cpu").tolist()
        return cls(p, x.shape, rows, tuple(starts), size)

    def windows(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of x, and their bits in its dtype."""
        bits, columns = pool(self.p, x.dtype, x.device, self.size), x.shape[1]
        for i, start in enumerate(self.starts):
            rows = slice(i * self.rows, min(len(x), (i + 1) * self.rows))
            n = rows.stop - rows.start
            yield rows, bits[start : start + n * columns].view(n, columns)

    def times(self, x: Tensor) -> Tensor:
        """x (rows, columns) with the dropped numbers zero."""
        if len(self.starts) == 1:
            return x * next(self.windows(x))[1]
        out = torch.empty_like(x)
        for rows, bits in self.windows(x):
            torch.mul(x[rows], bits, out=out[rows])
        return out

    def times_(self, x: Tensor) -> Tensor:
        """The same in place."""
        for rows, bits in self.windows(x):
            x[rows].mul_(bits)
        return x

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus what ``times`` gives for x, in place."""
        for rows, bits in self.windows(x):
            y[rows].addcmul_(x[rows], bits)
        return y


@dataclass
class Reading:
    """The input that layers read one after another, and the mask that they have in common."""

    x: weakref.ref[Tensor]
    version: int
    mask: Mask
    readers: set[int]


def reading(
    last: Reading | None, given: Tensor, reader: int, p: float, draw: Callable[[], Mask]
) -> Reading:
    """One more layer reads an input: with the mask that the ones before it had, where they read the
    same, else with a new one.

    Args:
        last: what was read last.
        given: the input.
        reader: which layer it is; one that comes again has a new mask.
        p: of its dropout.
        draw: makes a new mask.
    """
    if (
        last is None
        or last.x() is not given
        or last.version != given._version
        or last.mask.p != p
        or reader in last.readers
    ):
        return Reading(weakref.ref(given), given._version, draw(), {reader})
    last.readers.add(reader)
    return last


class Dropped(torch.autograd.Function):
    """x (rows, columns) with dropout: ``apply(mask, x)``."""

    @staticmethod
    def forward(ctx: Any, mask: Mask, x: Tensor) -> Tensor:
        ctx.mask = mask
        return mask.times(x).mul_(1 / (1 - mask.p) if mask.p < 1 else 0.0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, Dropped.apply(ctx.mask, g)  # type: ignore[no-untyped-call]
