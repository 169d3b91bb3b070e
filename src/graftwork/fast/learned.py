"""Low-rank products of many adapters that learn: y[i] += s[k] B[k] A[k] x[i], k the adapter of row
i, with gradients that are tensors of their own.

In torch's operations every factor of every adapter would be a node or two of the graph: its scale,
its place in a stack, a copy of its gradient, which comes transposed. Here a layer is one node, its
gradients come as each factor is laid out, and scales are in what is between A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grouped import Group
from .stack import Stack, Stacks

# what a linear layer is in torch's graph: it keeps its input and its weight
LINEAR = ("AddmmBackward0", "MmBackward0")
VIEWS = ("ViewBackward0", "UnsafeViewBackward0")


@dataclass
class Leaves:
    """The factors of one level, as the adapters hold them.

    Args:
        a: A (r, in) of each term.
        b: B (out, r) of each term, without its scale.
        scales: s of each term.
        dtype: in which the products are computed.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    dtype: torch.dtype

    def inputs(self) -> list[Tensor]:
        """The tensors that get gradients."""
        return [*self.a, *self.b]

    def factors(self, given: Sequence[Tensor], i: int, group: Group) -> tuple[Tensor, Tensor]:
        """A (pieces, rank, in) and B' (pieces, rank, out): products with long rows are fast.

        Args:
            given: the values of ``inputs``.
            i: the number of the group.
            group: the group.
        """
        n, r = len(self.a), group.rank
        own = [(given[t], given[n + t], begin) for t, begin in group.pieces]
        down = torch.stack([a if a.shape[0] == r else a[i : i + r] for a, _, i in own])
        up = torch.stack([b if b.shape[1] == r else b[:, i : i + r] for _, b, i in own])
        return down.to(self.dtype), up.to(self.dtype).mT.contiguous()

    def gradients(self, groups: Sequence[Group], found: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of ``inputs``.

        Args:
            groups: from ``Rows.plan``.
            found: those of A (pieces, rank, in) and B' (pieces, rank, out) of each group in turn.
        """
        n = len(self.a)
        parts: list[dict[int, Tensor]] = [{} for _ in range(2 * n)]  # by where a piece begins
        for group, down, up in zip(groups, found[::2], found[1::2], strict=True):
            pieces = zip(group.pieces, down.unbind(), up.mT.contiguous().unbind(), strict=True)
            for (t, begin), of_a, of_b in pieces:
                parts[t][begin], parts[n + t][begin] = of_a, of_b
        return [_one(pieces, int(i >= n)) for i, pieces in enumerate(parts)]

    def times(self, values: Tensor, group: Group) -> Tensor:
        """Values of each piece, (pieces, ...), times its scale; they are overwritten."""
        scales = [self.scales[t] for t, _ in group.pieces]
        if len(set(scales)) == 1:
            return values if scales[0] == 1 else values.mul_(scales[0])
        each = torch.tensor(scales, dtype=values.dtype, device=values.device)
        return values.mul_(each.view(-1, *[1] * (values.ndim - 1)))


@dataclass
class Lying(Leaves):
    """Factors of which those of a group are a stack, and are taken as they lie.

    Args:
        stacks: that of each group.
    """

    stacks: Sequence[Stack] = ()

    def inputs(self) -> list[Tensor]:
        return [tensor for stack in self.stacks for tensor in (stack.down, stack.up)]

    def factors(self, given: Sequence[Tensor], i: int, group: Group) -> tuple[Tensor, Tensor]:
        return given[2 * i].to(self.dtype), given[2 * i + 1].to(self.dtype)

    def gradients(self, groups: Sequence[Group], found: Sequence[Tensor]) -> list[Tensor | None]:
        return list(found)


def leaves(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
    groups: Sequence[Group],
    stacks: Stacks | None,
) -> Leaves:
    """The factors of one level, as they lie where those of each group can be in one of ``stacks``.

    Args:
        a: as in ``Leaves``, as the next three are.
        b: as there.
        scales: as there.
        dtype: as there.
        groups: from ``Rows.plan``.
        stacks: those of the model, where there are any.
    """
    general = Leaves(a, b, scales, dtype)
    if stacks is None or sum(len(group.pieces) for group in groups) != len(a):
        return general  # a rank of 0, or one that is cut into pieces
    found = []
    for group in groups:
        own = [t for t, _ in group.pieces]
        stack = stacks.of([a[t] for t in own], [b[t] for t in own])
        if stack is None:
            return general
        found.append(stack)
    return Lying(a, b, scales, dtype, found)


def add(y: Tensor, x: Tensor, groups: Sequence[Group], leaves: Leaves) -> Tensor:
    """y + s B A x by rows.

    Args:
        y: (rows, tokens, out); it may be overwritten.
        x: (rows, tokens, in), in the dtype of the products.
        groups: from ``Rows.plan``.
        leaves: the factors.
    """
    given = (y, x, groups, leaves, _free(y), *leaves.inputs())
    found: Tensor = Products.apply(*given)  # type: ignore[no-untyped-call]
    return found


def _free(y: Tensor) -> bool:
    """Whether what has computed y is known not to need it in its backward."""
    node: Any = y.grad_fn
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() in LINEAR


class Products(torch.autograd.Function):
    """See ``add``; a backward that is itself differentiated starts from the factors again."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, groups: Any, leaves: Any, free: bool, *given: Tensor
    ) -> Any:
        """The sum; kept: the input, the inner values, and the factors as products take them."""
        kept = []
        for i, group in enumerate(groups):
            down, up = leaves.factors(given, i, group)
            h = leaves.times(torch.bmm(down, _rows(x, group).mT), group)  # (pieces, rank, tokens)
            if group.whole:
                flat = y.detach().reshape(len(h), -1, y.shape[2])
                found = flat.baddbmm_(h.mT, up) if free else torch.baddbmm(flat, h.mT, up)
                y, free = found.view(y.shape), True
            else:
                update = torch.bmm(h.mT, up).view(-1, *y.shape[1:])
                y = y.index_add(0, group.index(x.device), update)
            kept += [down, up, h]
        ctx.groups, ctx.leaves, ctx.kept = groups, leaves, len(kept)
        ctx.save_for_backward(x, *kept, *given)
        return y if groups else y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradients of y, x and each tensor of factors."""
        x, *saved = ctx.saved_tensors
        kept, given, leaves = saved[: ctx.kept], saved[ctx.kept :], ctx.leaves
        if torch.is_grad_enabled():
            kept = _again(x, ctx.groups, leaves, given)
        found: list[Tensor] = []
        gx: Tensor | None = None
        for i, group in enumerate(ctx.groups):
            down, up, h = kept[3 * i : 3 * i + 3]
            own = _rows(g, group)
            gh = leaves.times(torch.bmm(up, own.mT), group)  # (pieces, rank, tokens)
            found += [torch.bmm(gh, _rows(x, group)), torch.bmm(h, own)]
            if ctx.needs_input_grad[1]:
                part = torch.bmm(gh.mT, down)
                gx = _put(gx, part.view(-1, *x.shape[1:]), group, x)
        return g, gx, None, None, None, *leaves.gradients(ctx.groups, found)


def _again(
    x: Tensor, groups: Sequence[Group], leaves: Leaves, given: Sequence[Tensor]
) -> list[Tensor]:
    """What the forward kept, as functions of the factors."""
    kept = []
    for i, group in enumerate(groups):
        down, up = leaves.factors(given, i, group)
        h = leaves.times(torch.bmm(down, _rows(x, group).mT), group)
        kept += [down, up, h]
    return kept


def _rows(x: Tensor, group: Group) -> Tensor:
    """The rows of each piece, (pieces, tokens, d)."""
    taken = x if group.whole else x.index_select(0, group.index(x.device))
    return taken.reshape(len(group.pieces), -1, x.shape[2])


def _put(total: Tensor | None, part: Tensor, group: Group, x: Tensor) -> Tensor:
    """The rows of a group's pieces added to those of the batch."""
    if group.whole:
        return part if total is None else total + part
    total = x.new_zeros(x.shape) if total is None else total
    return total.index_add(0, group.index(x.device), part)


def _one(pieces: dict[int, Tensor], axis: int) -> Tensor | None:
    """A factor's gradient from those of its pieces."""
    if not pieces:
        return None
    every = [pieces[begin] for begin in sorted(pieces)]
    return every[0] if len(every) == 1 else torch.cat(every, axis)
