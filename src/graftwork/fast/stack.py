"""Factors that several adapters learn at one layer, held as rows of one tensor while they do.

What reads all of them takes them as they lie, where it would have to copy each of them in each
step, and its gradient is one tensor. A factor stays a tensor that can be read and written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

_address, _learns = Tensor.data_ptr, attrgetter("requires_grad")
_hooks = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")


def _quiet(factors: Iterable[Tensor]) -> bool:
    """Whether factors learn, and nobody waits for their gradients within a backward."""
    every = tuple(factors)
    return all(map(_learns, every)) and not any(map(any, map(_hooks, every)))


class Stack:
    """A and B of some adapters at one layer, all of one shape.

    B lies transposed: so products read and give it with long rows, which are the fast ones.

    Args:
        a: A (r, in) of each adapter.
        b: B (out, r) of each adapter.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.a, self.b = tuple(a), tuple(b)
        self.factors = *self.a, *self.b
        with torch.no_grad():
            self.down = torch.stack(self.a)  # (adapters, r, in)
            self.up = torch.stack([one.mT for one in self.b])  # (adapters, r, out)
        self.rows = _rows(self.down, self.up)  # of ``factors``; those of B are transposed
        for i, (factor, row) in enumerate(zip(self.factors, self.rows, strict=True)):
            factor.data = row.mT if i >= len(self.a) else row
        self.down.requires_grad_()
        self.up.requires_grad_()
        self.ids = tuple(map(id, self.factors))
        self.addresses = list(map(_address, self.factors))
        self.shared = False  # whether the gradients of the factors are in those of the stack

    def holds(self) -> bool:
        """Whether no factor was given other data since, or is listened to."""
        same = list(map(_address, self.factors)) == self.addresses
        return same and _quiet(self.factors)

    def share(self) -> list[Tensor]:
        """The gradients of ``rows``; none where the factors have theirs by themselves."""
        down, up = self.down.grad, self.up.grad
        self.shared = down is not None and up is not None
        if down is None or up is None:
            return []
        rows = _rows(down, up)
        if any(factor.grad is not None for factor in self.factors):  # as from a penalty
            for i, (factor, row) in enumerate(zip(self.factors, rows, strict=True)):
                if factor.grad is not None:
                    row += factor.grad.mT if i >= len(self.a) else factor.grad
                    factor.grad = None
        return rows

    def forget(self) -> None:
        """Drop the gradients."""
        self.down.grad = self.up.grad = None
        for factor in () if self.shared else self.factors:
            factor.grad = None

    def release(self) -> None:
        """Give each factor a tensor of its own."""
        for factor, address in zip(self.factors, self.addresses, strict=True):
            if factor.data_ptr() == address:
                factor.data = factor.detach().clone(memory_format=torch.contiguous_format)


def _rows(down: Tensor, up: Tensor) -> list[Tensor]:
    return [*down.detach().unbind(), *up.detach().unbind()]


class Stacks:
    """The stacks of all layers, made as the layers are called.

    Args:
        learning: what may be in one: the factors whose gradients are asked for by ``share`` alone.
    """

    def __init__(self, learning: Iterable[Tensor]) -> None:
        self.free = {id(one): one for one in learning}
        self.made: dict[tuple[int, ...], Stack] = {}
        self.changed = False  # whether factors lie otherwise than when this was set to False

    def of(self, a: list[Tensor], b: list[Tensor]) -> Stack | None:
        """The stack of these factors; None where they cannot be one.

        Args:
            a: A (r, in) of each adapter.
            b: B (out, r) of each adapter.
        """
        key = tuple(map(id, (*a, *b)))
        if key not in self.made:
            if len({*key}) < len(key) or not self.free.keys() >= {*key}:
                return None
            kinds = {(one.dtype, one.device) for one in a + b}
            if len(kinds) > 1 or not _quiet(a + b):
                return None
            self.made[key] = Stack(a, b)
            for one in key:
                del self.free[one]
            self.changed = True
        return self.made[key]

    def share(self) -> dict[int, Tensor]:
        """The gradients of rows, by the id of the factor."""
        found: dict[int, Tensor] = {}
        for stack in self.made.values():
            if rows := stack.share():
                found.update(zip(stack.ids, rows, strict=True))
        return found

    def rows(self) -> dict[int, tuple[Tensor, bool]]:
        """The rows and whether they are the factor transposed, by the id of the factor."""
        return {
            key: (row, i >= len(stack.a))
            for stack in self.made.values()
            for i, (key, row) in enumerate(zip(stack.ids, stack.rows, strict=True))
        }

    def forget(self) -> None:
        """Drop all gradients."""
        for stack in self.made.values():
            stack.forget()

    def release(self, factors: Iterable[Tensor] | None = None) -> bool:
        """Undo the stacks that some factors are in, or all, and those of which a factor was given
        other data; whether there were any.
        """
        gone = None if factors is None else {id(one) for one in factors}
        before = len(self.made)
        for key, stack in list(self.made.items()):
            if gone is None or not gone.isdisjoint(key) or not stack.holds():
                del self.made[key]
                stack.release()
                self.free.update((id(one), one) for one in stack.factors)
        self.changed = self.changed or len(self.made) < before
        return len(self.made) < before
