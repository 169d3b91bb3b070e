"""Factors that several adapters learn at one layer, held as rows of one tensor while they do.

What reads all of them takes them as they lie, where it would have to copy each of them in each
step, and its gradient is one tensor. A factor stays a tensor that can be read and written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_address = Tensor.data_ptr


def _quiet(factor: Any) -> bool:
    """Whether a factor learns, and nobody waits for its gradient within a backward."""
    hooks = factor._backward_hooks or factor._post_accumulate_grad_hooks
    return bool(factor.requires_grad and not hooks)


class Stack:
    """A and B of some adapters at one layer, all of one shape.

    B lies transposed: so products read and give it with long rows, which are the fast ones.

    Args:
        a: A (r, in) of each adapter.
        b: B (out, r) of each adapter.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.a, self.b = tuple(a), tuple(b)
        with torch.no_grad():
            self.down = torch.stack(self.a)  # (adapters, r, in)
            self.up = torch.stack([one.mT for one in self.b])  # (adapters, r, out)
        for factor, row in zip(self.factors, self._rows(self.down, self.up), strict=True):
            factor.data = row
        self.down.requires_grad_()
        self.up.requires_grad_()
        self.addresses = list(map(_address, self.factors))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Every A, and then every B."""
        return *self.a, *self.b

    @staticmethod
    def _rows(down: Tensor, up: Tensor) -> list[Tensor]:
        """The rows in the order and the shapes of ``factors``."""
        return [*down.detach().unbind(), *up.detach().mT.unbind()]

    def holds(self) -> bool:
        """Whether no factor was given other data since, or is listened to."""
        factors = self.factors
        return list(map(_address, factors)) == self.addresses and all(map(_quiet, factors))

    def share(self) -> bool:
        """Give each factor its gradient; whether they are rows of ``down.grad`` and ``up.grad``."""
        down, up = self.down.grad, self.up.grad
        if down is None or up is None:
            return False
        for factor, row in zip(self.factors, self._rows(down, up), strict=True):
            if factor.grad is not None:  # from elsewhere, as a penalty
                row += factor.grad
            factor.grad = row
        return True

    def forget(self) -> None:
        """Drop the gradients."""
        self.down.grad = self.up.grad = None

    def release(self) -> None:
        """Give each factor a tensor of its own."""
        for factor, address in zip(self.factors, self.addresses, strict=True):
            if factor.data_ptr() == address:
                factor.data = factor.detach().clone(memory_format=torch.contiguous_format)


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
            if len(kinds) > 1 or not all(map(_quiet, a + b)):
                return None
            self.made[key] = Stack(a, b)
            for one in key:
                del self.free[one]
            self.changed = True
        return self.made[key]

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
