"""Whose the rows of a mixed batch are, and the batched products with factors that learn.

Rows of one adapter are one factor of a batched product, and adapters of one rank and one number of
rows are one batched product. Where the ranks are many, each is cut at the powers of two that it is
made of (37 = 32 + 4 + 1): a few products for all ranks, and no factor is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .chunks import Sorted

FEW = 8  # tokens a row: with no more, moving inputs is cheaper than moving factors
MANY = 16  # batches that are remembered
Piece = tuple[int, int]  # which term, and where in its rank the piece begins


@dataclass
class Group:
    """One batched product.

    Args:
        rank: of each piece.
        pieces: which terms, and from where in their factors.
        rows: the rows of the batch that belong to them, those of a piece next to each other.
        whole: ``rows`` are all rows of the batch in their order, so that none is moved.
    """

    rank: int
    pieces: list[Piece]
    rows: list[int]
    whole: bool
    places: dict[torch.device, Tensor] = field(default_factory=dict)

    def index(self, device: torch.device) -> Tensor:
        """``rows`` on a device."""
        if device not in self.places:
            if torch.compiler.is_compiling():
                return torch.tensor(self.rows, device=device)
            self.places[device] = torch.tensor(self.rows, device=device)
        return self.places[device]


class Rows:
    """Whose the rows of a batch are, by adapter; found once, and the same at all layers.

    Args:
        owners: the adapter of each row.
        order: names in the order that the adapters shall have; by default that of their rows.
    """

    def __init__(self, owners: Sequence[str], order: Sequence[str] = ()) -> None:
        found: dict[str, list[int]] = {}
        for i, name in enumerate(owners):
            found.setdefault(name, []).append(i)
        place = {name: i for i, name in enumerate(order)}
        self.names = tuple(sorted(found, key=lambda name: place.get(name, -1)))
        self.where = [found[name] for name in self.names]
        self.key = self.names, tuple(map(len, self.where))
        self.n = len(owners)
        self.plans: dict[tuple[tuple[int, int], ...], list[Group]] = {}
        self.orders: dict[tuple[tuple[int, int], ...], Sorted] = {}
        every = Group(0, [], self._owners(), False)
        self.owner = every.index  # device -> which of ``names`` each row has, (rows,)

    def _owners(self) -> list[int]:
        owners = [0] * self.n
        for k, rows in enumerate(self.where):
            for i in rows:
                owners[i] = k
        return owners

    def plan(self, terms: tuple[tuple[int, int], ...]) -> list[Group]:
        """The products for terms that learn, each the number of its adapter and a rank."""
        if terms not in self.plans:
            self.plans[terms] = self._plan(terms)
        return self.plans[terms]

    def sorted(self, terms: tuple[tuple[int, int], ...]) -> Sorted:
        """The products for such terms, where nothing learns."""
        if terms not in self.orders:
            self.orders[terms] = Sorted(self.where, terms, self.n)
        return self.orders[terms]

    def _plan(self, terms: tuple[tuple[int, int], ...]) -> list[Group]:
        counts: dict[int, list[int]] = {}
        for t, (k, _) in enumerate(terms):
            counts.setdefault(len(self.where[k]), []).append(t)
        groups = []
        for members in counts.values():
            for rank, pieces in cut([(t, terms[t][1]) for t in members]).items():
                rows = [i for t, _ in pieces for i in self.where[terms[t][0]]]
                groups.append(Group(rank, pieces, rows, rows == list(range(self.n))))
        return groups


class Batches(dict[Any, Rows]):
    """Mixed batches of late, by what they were made of."""

    def add(self, key: Any, owners: Sequence[str], order: Sequence[str]) -> Rows:
        """The batch of a key, made where it is not there."""
        found = self.get(key) or Rows(owners, order)
        for oldest in tuple(self)[: max(0, len(self) - MANY + 1)] if key not in self else ():
            self.pop(oldest, None)  # threads may do so at once
        self[key] = found
        return found


def cut(ranks: Sequence[tuple[int, int]]) -> dict[int, list[Piece]]:
    """Terms with their ranks -> pieces by rank: whole where that makes no more groups."""
    whole: dict[int, list[Piece]] = {}
    parts: dict[int, list[Piece]] = {}
    for t, rank in ranks:
        if rank:
            whole.setdefault(rank, []).append((t, 0))
        begin = 0
        for bit in reversed(range(rank.bit_length())):
            if rank >> bit & 1:
                parts.setdefault(1 << bit, []).append((t, begin))
                begin += 1 << bit
    return whole if len(whole) <= len(parts) else parts


def by_row(table: Tensor, owner: Tensor) -> Tensor:
    """A vector for each adapter (adapters, d) -> one for each row, (rows, 1, d)."""
    return table.index_select(0, owner)[:, None]


def dropout(x: Tensor, p: Sequence[float], owner: Tensor) -> Tensor:
    """x (rows, tokens, in) with the dropout of each row's adapter.

    Args:
        x: the input.
        p: the probability of each adapter.
        owner: the adapter of each row, (rows,).
    """
    if len(set(p)) == 1:
        return torch.nn.functional.dropout(x, p[0])
    keep = 1 - torch.tensor(p, device=x.device, dtype=torch.float32).index_select(0, owner)
    keep = keep[:, None, None]
    kept = torch.rand(x.shape, device=x.device) < keep
    return x * (kept / keep.clamp(min=1e-12)).to(x.dtype)
