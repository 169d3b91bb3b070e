"""Which adapters train: flags are written where they change, without a walk over the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

Table = dict[str, Any]  # a module's own parameters by name: whoever exchanges one does it there
Find = Callable[[], Iterable[tuple[str, nn.Module]]]  # each adapter's name with a part of it


class Flags:
    """``requires_grad`` of the tensors of a model's adapters, by the adapters' names."""

    def __init__(self) -> None:
        self.trains: set[str] = set()  # the adapters that somebody has unfrozen
        self.hiding: set[str] = set()  # those with parts that may take the effect from others
        self.reading: set[str] = set()  # those with parts that follow from others
        self.tables: dict[str, list[Table]] | None = {}  # None: to be found again

    def __getstate__(self) -> dict[str, Any]:
        # the tables are those of a model: a copy of it, or of a part of it, has others
        known = {key: set(value) for key, value in vars(self).items() if key != "tables"}
        return {**known, "tables": None}

    def add(self, name: str, part: nn.Module) -> None:
        """Know of one more part of an adapter."""
        if self.tables is not None:
            own = [m._parameters for m in part.modules() if m._parameters]
            self.tables.setdefault(name, []).extend(own)

    def note(self, name: str, hides: bool, reads: bool) -> None:
        """Remember what an adapter's part may do to others, or others to it."""
        self.hiding |= {name} if hides else set()
        self.reading |= {name} if reads else set()

    def forget(self) -> None:
        """Parts of some adapters are gone: find all of them again when they are needed."""
        self.tables = None

    def drop(self, names: Iterable[str]) -> None:
        """Adapters are gone."""
        for name in names:
            for group in (self.trains, self.hiding, self.reading):
                group.discard(name)
            if self.tables is not None:
                self.tables.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """An adapter has another name."""
        for group in (self.trains, self.hiding, self.reading):
            if old in group:
                group.remove(old)
                group.add(new)
        if self.tables is not None and old in self.tables:
            self.tables[new] = self.tables.pop(old)

    def hide(self, names: Iterable[str]) -> bool:
        """Whether one of these adapters may take the effect from others."""
        return not self.hiding.isdisjoint(names)

    def write(self, names: Iterable[str], on: bool, find: Find) -> None:
        """Freeze or unfreeze adapters."""
        tables = self.found(find)
        for name in names:
            for table in tables.get(name, ()):
                for p in table.values():
                    if p is not None and p.is_floating_point():
                        p.requires_grad = on
            (self.trains.add if on else self.trains.discard)(name)

    def choose(self, names: Iterable[str], on: bool, find: Find) -> None:
        """Freeze or unfreeze adapters, and freeze all others."""
        chosen, tables = set(names), self.found(find)
        # a program may have unfrozen others by hand: mostly all their tensors, or those of a kind
        seen = {n for n, t in tables.items() if n not in chosen and any(map(trains, _ends(t)))}
        self.write((self.trains | seen) - chosen, False, find)
        self.write(chosen, on, find)

    def found(self, find: Find) -> dict[str, list[Table]]:
        """The tables, of which a copy of a model has none at first."""
        if self.tables is None:
            self.tables = {}
            for name, part in find():
                self.add(name, part)
        return self.tables


def hold(p: Tensor, stopped: bool, frozen: bool = True) -> None:
    """Stop a tensor from training, whoever unfreezes it, or let it train again.

    Args:
        p: a tensor that trains.
        stopped: whether it gets no gradient any more.
        frozen: whether it is then also one that asks for none.
    """
    held = getattr(p, "held", None)
    if not stopped and held is None:
        return
    p.requires_grad_(True)
    if stopped and held is None:
        p.held = p.register_post_accumulate_grad_hook(_drop)  # type: ignore
    elif not stopped and held is not None:
        held.remove()
        p.held = None  # type: ignore[attr-defined]
    p.grad = None
    p.requires_grad_(not (stopped and frozen))


def _drop(p: Tensor) -> None:
    p.grad = None


def _ends(tables: list[Table]) -> Iterator[Tensor | None]:
    for table in (tables[0], tables[-1]) if tables else ():
        yield from table.values()


def trains(tensor: Tensor | None) -> bool:
    """Whether a tensor is to change by training."""
    return tensor is not None and tensor.requires_grad and getattr(tensor, "held", None) is None
