"""Low-rank products of many adapters of whichever ranks in one batch: y[i] += B[k] A[k] x[i], k the
adapter of row i.

The rows are taken in the order of their adapters' ranks. So the rows whose adapter has more than so
many ranks are the last ones, and its next few ranks are one batched product with a slice of the
rows. An adapter whose rank ends within these is filled up with zeros: where the ranks are cut is
chosen so that zeros and products together cost least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

COST = 32  # ranks of an adapter that are as much work as one product more
Factors = list[tuple[Tensor, Tensor]]


@dataclass
class Chunk:
    """One batched product.

    Args:
        begin: the first of its ranks.
        end: that after the last one.
        terms: the numbers of the adapters' terms.
        first: which of the adapters with as many rows is the first of them.
    """

    begin: int
    end: int
    terms: list[int]
    first: int


@dataclass
class Alike:
    """Adapters with as many rows.

    Args:
        n: how many adapters.
        rows: theirs, in the order of ``Sorted``.
        chunks: the products; the first one is with all of them.
    """

    n: int
    rows: slice
    chunks: list[Chunk]


class Sorted:
    """The rows of a batch in the order of ranks, and the products with them.

    Args:
        where: the rows of each adapter.
        terms: the number of its adapter, and a rank.
        n: all rows.
    """

    def __init__(
        self, where: Sequence[Sequence[int]], terms: Sequence[tuple[int, int]], n: int
    ) -> None:
        counts: dict[int, list[int]] = {}  # a batched product has as many rows of each adapter
        for t, (k, rank) in enumerate(terms):
            if rank:
                counts.setdefault(len(where[k]), []).append(t)
        self.order: list[int] = []
        self.groups: list[Alike] = []
        for members in counts.values():
            members.sort(key=lambda t: terms[t][1])
            ranks, start, chunks = [terms[t][1] for t in members], len(self.order), []
            self.order += [i for t in members for i in where[terms[t][0]]]
            for low, high in pairwise(cut(ranks)):
                first = sum([rank <= low for rank in ranks])
                chunks.append(Chunk(low, high, members[first:], first))
            self.groups.append(Alike(len(members), slice(start, len(self.order)), chunks))
        self.chunks = [chunk for group in self.groups for chunk in group.chunks]
        self.whole = self.order == list(range(n))
        self.places: dict[torch.device, Tensor] = {}

    def index(self, device: torch.device) -> Tensor:
        """The order on a device."""
        if torch.compiler.is_compiling():
            return torch.tensor(self.order, device=device)
        if device not in self.places:
            self.places[device] = torch.tensor(self.order, device=device)
        return self.places[device]


def cut(ranks: Sequence[int]) -> list[int]:
    """Where ranks are cut, from 0 to the largest; each cut is at one of them, since between two of
    them it would end no adapter.
    """
    ends = sorted({0, *ranks})
    more = [sum([rank > end for rank in ranks]) for end in ends]
    costs, cuts = [0], [[0]]  # the least that it costs up to each end, and how
    for j in range(1, len(ends)):  # in words that a compiler follows
        least, last = 0, -1
        for i in range(j):
            cost = costs[i] + more[i] * (ends[j] - ends[i]) + COST
            if last < 0 or cost < least:
                least, last = cost, i
        costs.append(least)
        cuts.append([*cuts[last], ends[j]])
    return cuts[-1]


def stacks(
    by: Sorted, a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype, keep: bool
) -> Factors:
    """The factors of each chunk: A (adapters, in, ranks), a view, and B (adapters, ranks, out).

    Args:
        by: the products.
        a: A (r, in) of each term.
        b: B (out, r) of each term.
        dtype: of the stacks.
        keep: they are used many times, so B is laid out the way in which it is read.
    """
    made = []
    for chunk in by.chunks:
        low, high = chunk.begin, chunk.end
        down = torch.stack([_filled(a[t][low:high], high - low, 0) for t in chunk.terms])
        up = torch.stack([_filled(b[t][:, low:high], high - low, 1) for t in chunk.terms])
        up = up.to(dtype).mT
        made.append((down.to(dtype).mT, up.contiguous() if keep else up))
    return made


def _filled(x: Tensor, size: int, dim: int) -> Tensor:
    """x (n, m) with zeros up to a size."""
    lacking = size - x.shape[dim]
    return x if not lacking else F.pad(x, (0, 0, 0, lacking) if dim == 0 else (0, lacking))


def add(y: Tensor, x: Tensor, by: Sorted, factors: Factors, in_place: bool) -> Tensor:
    """y + B A x by rows.

    Args:
        y: (rows, tokens, out); contiguous where ``in_place``, and overwritten.
        x: (rows, tokens, in).
        by: the products.
        factors: from ``stacks``.
        in_place: nothing is recorded for a backward, and y may be written to.
    """
    if not by.chunks:
        return y
    order = None if by.whole else by.index(x.device)
    taken = x if order is None else x.index_select(0, order)
    if not in_place:
        return _added(y, taken, by, factors)
    total = y if order is None else y.new_empty(len(by.order), *y.shape[1:])
    pairs = iter(factors)
    for group in by.groups:
        x3 = taken[group.rows].reshape(group.n, -1, x.shape[2])
        y3 = total[group.rows].view(group.n, -1, y.shape[2])
        for chunk in group.chunks:
            down, up = next(pairs)
            h = torch.bmm(x3[chunk.first :], down)
            # the first product is with all of them, so that it writes all of the sum
            y3[chunk.first :].baddbmm_(h, up, beta=1 if chunk.begin or order is None else 0)
    return y if order is None else y.index_add_(0, order, total)


def _added(y: Tensor, taken: Tensor, by: Sorted, factors: Factors) -> Tensor:
    """The same as a tensor of its own; ``taken``: x in the order."""
    if by.whole and len(by.chunks) == 1:
        (group,), ((down, up),) = by.groups, factors
        h = torch.bmm(taken.reshape(group.n, -1, taken.shape[2]), down)
        return torch.baddbmm(y.reshape(group.n, -1, y.shape[2]), h, up).view(y.shape)
    updates, places, order, pairs = [], [], by.index(y.device), iter(factors)
    for group in by.groups:
        x3 = taken[group.rows].reshape(group.n, -1, taken.shape[2])
        rows = order[group.rows].view(group.n, -1)
        for chunk in group.chunks:
            down, up = next(pairs)
            h = torch.bmm(x3[chunk.first :], down)
            updates.append(torch.bmm(h, up).view(-1, *y.shape[1:]))
            places.append(rows[chunk.first :].flatten())
    # at once, since each would copy y
    return y.index_add(0, torch.cat(places), torch.cat(updates))
