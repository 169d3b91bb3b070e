"""Turns: threads run a model and change its adapters, and no output is a mixture.

A forward is one of the adapters as they were when it began, or as they are after a change. Each
thread notes which adapters its outermost forward uses; a change of an adapter closes it, waits for
the forwards that use it, and holds back new ones. Forwards with other adapters go on meanwhile.
Nothing is locked for a forward where nobody changes anything: two entries in a dictionary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from ..errors import StateError
from .rows import tensors_in

if TYPE_CHECKING:
    from ..engine.switch import Call, Switch

NOBODY = ("", "__base__")  # where a name of an adapter stands for none
Method = TypeVar("Method", bound=Callable[..., Any])


class _Calls(threading.local):
    def __init__(self) -> None:  # on each thread's own object: compiled code does not watch a class
        self.now: Call | None = None
        self.replay: Call | None = None


CALLS = _Calls()
# a backward and a model's switch -> the call whose forward may be repeated in it
REPLAYS: dict[tuple[int, int], Call] = {}


class Turns:
    """Which adapters of a model are in use in which threads, and which are being changed."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[str, ...]] = {}  # by thread
        self.changes = threading.RLock()  # one change at a time
        self.moved = threading.Condition()  # something of what follows has changed
        self.by = 0  # the thread that makes a change, or is about to
        self.closed: frozenset[str] | None = frozenset()  # the adapters concerned; None: all
        self.begun = False  # nobody uses them any more

    def __deepcopy__(self, memo: Any) -> Turns:
        return Turns()

    def __reduce__(self) -> Any:
        return Turns, ()

    def concerns(self, names: Iterable[str]) -> bool:
        """Whether a change concerns one of these adapters."""
        return self.closed is None or not self.closed.isdisjoint(names)

    def note(self, me: int, names: tuple[str, ...] | None) -> None:
        """Note what a thread uses; None: nothing any more."""
        if names is None:
            del self.running[me]
        else:
            self.running[me] = names

    def wait(self, me: int, before: tuple[str, ...] | None) -> None:
        """Let a change that concerns this thread's forward come first.

        Args:
            me: the thread.
            before: what a forward around it uses, which a change that has not begun waits for.
        """
        names = self.running[me]
        with self.moved:
            while (
                self.by not in (0, me) and (self.begun or before is None) and self.concerns(names)
            ):
                self.note(me, before)
                self.moved.notify_all()
                self.moved.wait()
                self.running[me] = names

    def left(self) -> None:
        """Tell a change that a forward has ended."""
        with self.moved:
            self.moved.notify_all()

    @contextmanager
    def change(self, names: Iterable[str] | None = ()) -> Iterator[None]:
        """Within the block no other thread changes adapters, and none runs a forward with these.

        Args:
            names: the adapters; None: all, and the model without any.

        Raises:
            StateError: this thread is within a forward, and another one is changing adapters.
        """
        me = get_ident()
        if not self.changes.acquire(blocking=me not in self.running):
            raise StateError(
                "adapters cannot be changed from within a forward of the model while another "
                "thread is changing them: neither would end. Change them between two forwards"
            )
        before = self.by, self.closed, self.begun
        try:
            with self.moved:
                every = names is None or self.closed is None
                self.closed = None if every else frozenset(names or ()) | (self.closed or set())
                self.by, self.begun = me, False
                while any(
                    other != me and self.concerns(used)
                    for other, used in self.running.copy().items()
                ):
                    self.moved.wait()
                self.begun = True
            yield
        finally:
            with self.moved:
                self.by, self.closed, self.begun = before
                self.moved.notify_all()
            self.changes.release()


class Turn:
    """One forward: its choice of adapters holds to its end, and they stay what they are.

    Args:
        switch: the model's.
        rows: one adapter name for each row of the batch, where the call has them.
    """

    __slots__ = ("before", "call", "me", "rows", "switch")

    def __init__(self, switch: Switch, rows: Iterable[str] | None) -> None:
        self.switch, self.rows = switch, None if rows is None else tuple(rows)

    def __enter__(self) -> None:
        switch, self.me = self.switch, get_ident()
        turns, self.call = switch.turns, CALLS.now
        self.before = turns.running.get(self.me)
        if self.before is None and self.call is None and self.rows is None and not REPLAYS:
            now = switch.standing
            turns.running[self.me] = now.active
            if now is switch.standing and not turns.by:  # nobody has changed it meanwhile
                CALLS.now = now
                return
        CALLS.now = self.settle(switch, turns)

    def settle(self, switch: Switch, turns: Turns) -> Call:
        """Note what is used where there is more to it than that; gives the call that holds."""
        while True:
            now = switch.current()
            names = self.rows or now.rows or now.active
            turns.running[self.me] = names if self.before is None else self.before + names
            if turns.by:
                turns.wait(self.me, self.before)
            if now is switch.current():
                break  # else another choice came before this one was noted
        gone = [n for n in names if n not in switch.configs and n not in NOBODY]
        if gone:
            self.__exit__()
            switch.check(tuple(gone))
        return now

    def __exit__(self, *_: Any) -> None:
        CALLS.now = self.call
        turns = self.switch.turns
        if self.before is None:
            del turns.running[self.me]
        else:
            turns.running[self.me] = self.before
        if turns.by:
            turns.left()


def alone(method: Method) -> Method:
    """A method of a model's root during which nothing runs the model, and nothing else changes
    it.
    """

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.switch.turns.change(None):
            return method(self, *args, **kwargs)

    return cast(Method, run)


def ordered(method: Method) -> Method:
    """A method of a model's root during which nothing else changes the model; forwards go on."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.switch.turns.change():
            return method(self, *args, **kwargs)

    return cast(Method, run)


def remember(call: Call, outputs: Any) -> None:
    """Tie a call to ``outputs``: a forward may be repeated in their backward, whichever thread of
    torch's runs that.
    """

    def replay(_: Any) -> None:
        key = torch._C._current_graph_task_id(), id(call.switch)
        REPLAYS[key] = CALLS.replay = call
        torch.autograd.Variable._execution_engine.queue_callback(partial(_forget, key))

    for tensor in tensors_in(outputs):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(replay)


def replayed(switch: Switch) -> Call | None:
    """The call whose forward is repeated in the backward that runs in this thread, if any."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return None
    own = REPLAYS.get((task, id(switch)))  # none in a backward within a backward
    last = CALLS.replay if own is None else own
    return last if last is not None and last.switch is switch else None


def _forget(key: tuple[int, int]) -> None:
    REPLAYS.pop(key, None)
    CALLS.replay = None
