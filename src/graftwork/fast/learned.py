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

    def down(self, group: Group) -> Tensor:
        """A of each piece, (pieces, rank, in)."""
        own = [(self.a[t], i) for t, i in group.pieces]
        r = group.rank
        return _stack([a if a.shape[0] == r else a[i : i + r] for a, i in own], self.dtype)

    def up(self, group: Group) -> Tensor:
        """B' of each piece, (pieces, rank, out): products with long rows are the fast ones."""
        own = [(self.b[t], i) for t, i in group.pieces]
        r = group.rank
        made = _stack([b if b.shape[1] == r else b[:, i : i + r] for b, i in own], self.dtype)
        return made.mT.contiguous()

    def times(self, values: Tensor, group: Group) -> Tensor:
        """Values of each piece, (pieces, ...), times its scale."""
        scales = [self.scales[t] for t, _ in group.pieces]
        if len(set(scales)) == 1:
            return values if scales[0] == 1 else values * scales[0]
        each = torch.tensor(scales, dtype=values.dtype, device=values.device)
        return values * each.view(-1, *[1] * (values.ndim - 1))


def _stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(list(tensors)).to(dtype)


def add(y: Tensor, x: Tensor, groups: Sequence[Group], leaves: Leaves) -> Tensor:
    """y + s B A x by rows.

    Args:
        y: (rows, tokens, out).
        x: (rows, tokens, in), in the dtype of the products.
        groups: from ``Rows.plan``.
        leaves: the factors.
    """
    found: Tensor = Products.apply(y, x, groups, leaves, *leaves.a, *leaves.b)  # type: ignore[no-untyped-call]
    return found


class Products(torch.autograd.Function):
    """See ``add``; a backward that is itself differentiated starts from the factors again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, groups: Any, leaves: Any, *factors: Tensor) -> Any:
        """The sum; kept: the input, the inner values, and the stacks."""
        kept = []
        for group in groups:
            down, up = leaves.down(group), leaves.up(group)
            taken = _rows(x, group)
            h = leaves.times(torch.bmm(down, taken.mT), group)  # (pieces, rank, tokens)
            if group.whole:
                flat = y.reshape(len(h), -1, y.shape[2])
                y = torch.baddbmm(flat, h.mT, up).view(y.shape)
            else:
                update = torch.bmm(h.mT, up).view(-1, *y.shape[1:])
                y = y.index_add(0, group.index(x.device), update)
            kept += [down, up, h]
        ctx.groups, ctx.leaves, ctx.kept = groups, leaves, len(kept)
        ctx.save_for_backward(x, *kept, *factors)
        return y if groups else y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradients of y, x and each factor."""
        x, *saved = ctx.saved_tensors
        kept, factors, leaves = saved[: ctx.kept], saved[ctx.kept :], ctx.leaves
        n = len(factors) // 2
        if torch.is_grad_enabled():
            leaves = Leaves(factors[:n], factors[n:], leaves.scales, leaves.dtype)
            kept = _again(x, ctx.groups, leaves)
        found: list[dict[int, Tensor]] = [{} for _ in factors]  # by where a piece begins
        gx: Tensor | None = None
        for k, group in enumerate(ctx.groups):
            down, up, h = kept[3 * k : 3 * k + 3]
            own = _rows(g, group)
            gh = leaves.times(torch.bmm(own, up.mT), group)  # (pieces, tokens, rank)
            ga = torch.bmm(gh.mT, _rows(x, group))
            gb = torch.bmm(h, own).mT.contiguous()
            pieces = zip(group.pieces, ga.unbind(), gb.unbind(), strict=True)
            for (t, begin), of_a, of_b in pieces:
                found[t][begin], found[n + t][begin] = of_a, of_b
            if ctx.needs_input_grad[1]:
                part = torch.bmm(gh, down)
                gx = _put(gx, part.view(-1, *x.shape[1:]), group, x)
        whole = [_one(pieces, int(i >= n)) for i, pieces in enumerate(found)]
        return g, gx, None, None, *whole


def _again(x: Tensor, groups: Sequence[Group], leaves: Leaves) -> list[Tensor]:
    """What the forward kept, as functions of the factors."""
    kept = []
    for group in groups:
        down = leaves.down(group)
        h = leaves.times(torch.bmm(down, _rows(x, group).mT), group)
        kept += [down, leaves.up(group), h]
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
