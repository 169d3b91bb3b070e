"""Switch: the one place that knows which adapters are active. One object a model, shared by all its
hosts.

A choice for one call (``adapter_names=``, ``using()``, ``disable_adapter()``) travels in a
thread-local ``Call``, so threads do not see each other's, and layers cannot disagree. Gradient
checkpointing runs the forward again during backward, when that call is over: the model's outputs
carry a hook that names their call to the recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..config import PeftConfig
from ..errors import StateError, did_you_mean
from ..fast import choose
from ..fast.flags import Flags
from ..fast.grouped import FEW, Batches, Rows
from ..fast.rows import expand
from ..fast.turns import CALLS, REPLAYS, Turn, Turns, remember, replayed
from ..targets.names import BASE as BASE

if TYPE_CHECKING:
    from .schedule import Schedule


@dataclass(frozen=True, eq=False)
class Call:
    """The choice that holds for one call of a model."""

    switch: Switch
    active: tuple[str, ...]
    rows: tuple[str, ...] | None = None  # one adapter name a row of a mixed batch
    context: dict[str, Any] = field(default_factory=dict)  # for routed methods: task ids, gates


class Switch:
    """A model's adapters, which of them are active, and what was trainable before."""

    def __init__(self) -> None:
        self.configs: dict[str, PeftConfig] = {}
        self.schedules: dict[str, Schedule] = {}  # of the adapters that follow the optimizer
        self.shared: dict[str, Any] = {}  # what the parts of an adapter share, where they do
        self.trainable: frozenset[str] = frozenset()  # base parameters that were trainable before
        self.merged: tuple[str, ...] = ()  # what is merged into the whole model, the lowest first
        self.before_merge: tuple[str, ...] = ()  # what was active before
        self.tied: dict[str, Any] | None = None  # what the config said of ties that merging has cut
        self.flags = Flags()  # which adapters train
        self.proven: dict[str, PeftConfig] = {}  # the adapters that were seen to learn
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.standing = Call(self, ())
        self.reads: tuple[str, ...] = ()  # arguments of a call that some adapter has ever read
        self.busy = False  # whether an adapter ever did something around a forward
        self.batches = Batches()  # mixed batches of late
        self.turns = Turns()  # what runs in which thread

    def activate(self, names: tuple[str, ...] | None = None, enabled: bool | None = None) -> None:
        """Choose the active adapters, the lowest first, and whether they run at all."""
        with self.turns.change():
            self.active = self.active if names is None else names
            self.enabled = self.enabled if enabled is None else enabled
            before, self.standing = self.standing, Call(self, self.active if self.enabled else ())
        if CALLS.now is before:  # within a forward of this very thread
            CALLS.now = self.standing

    def take(self, name: str, config: PeftConfig) -> None:
        """Take an adapter's config in. What is learned of all of them stays: a compiled forward
        asks for that, and not for each of them, so that one more does not compile it again.
        """
        self.configs[name] = config
        choose.unlink(self)
        self.reads = tuple(sorted({*self.reads, *config.CONTEXT}))
        own = type(config).after is not PeftConfig.after
        self.busy = self.busy or config.prepares() or own

    def change(self, *names: str) -> Any:
        """A context in which no other thread runs these adapters, or changes any; of those that
        read others it is not known whose they read.
        """
        return self.turns.change(None if self.flags.reading else names)

    def check(self, names: str | Sequence[str]) -> tuple[str, ...]:
        """``names``, each once, where all are adapters of this model."""
        names = tuple(dict.fromkeys((names,) if isinstance(names, str) else names))
        for name in names:
            if name not in self.configs:
                raise StateError(
                    f"there is no adapter {name!r}; this model has {sorted(self.configs) or 'none'}"
                    + did_you_mean(name, self.configs)
                )
        return names

    def batch(self, rows: tuple[str, ...], x: torch.Tensor, path: str) -> Rows:
        """The inputs of a layer in a mixed batch by adapter, sorted once for all layers."""
        if torch.compiler.is_compiling():  # which asks whether what it has read is as it was
            return Rows(expand(rows, len(x), path))
        n = x.shape[0]
        key = rows, n, x.numel() > n * FEW * x.shape[-1]
        if n == len(rows) and (found := self.batches.get(key)):
            return found
        order = () if key[2] else tuple(self.configs)
        return self.batches.add(key, expand(rows, n, path), order)

    def current(self) -> Call:
        """The choice that holds here and now."""
        now = CALLS.now
        if now is not None and now.switch is self:
            return now
        if not torch.compiler.is_compiling() and REPLAYS:
            return replayed(self) or self.standing
        return self.standing

    def turn(self, rows: Any = None) -> Any:
        """A context for one forward; ``rows``: one adapter name for each row of its batch."""
        return nullcontext() if torch.compiler.is_compiling() else Turn(self, rows)

    @contextmanager
    def call(
        self, active: tuple[str, ...], rows: tuple[str, ...] | None = None, **context: Any
    ) -> Iterator[None]:
        """Within the block, in this thread, the model computes with this choice."""
        before = CALLS.now
        CALLS.now = Call(self, active, rows, context)
        try:
            yield
        finally:
            CALLS.now = before

    def remember(self, outputs: Any) -> None:
        """Tie the present choice to ``outputs``: a forward may be repeated in their backward."""
        choose.settle()
        remember(self.current(), outputs)
