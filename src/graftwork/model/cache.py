"""A cache of adapters: thousands on disk, a few in the model, loaded when they are used."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from ..config import CONFIG_NAME
from ..engine.forwards import each_forward
from ..engine.switch import BASE
from ..engine.tree import parts
from ..errors import FileError, StateError, did_you_mean, warn
from ..files.atomic import settled
from ..files.folder import WEIGHTS
from ..files.hub import Source
from ..targets.names import check_name
from .peft_model import PeftModel

Where = str | os.PathLike[str]  # a folder, or a hub id


class AdapterCache:
    """Adapters that come into a model when they are used; those that were used longest ago go.

    Threads may share it: each chooses for itself, and what one of them uses stays.

    Args:
        model: a ``PeftModel``, or a base model. Adapters that it has already stay, and do not
            count.
        source: a folder that holds a folder for each adapter; or the folder or hub id of each by
            its name, as a mapping or a function.
        capacity: how many adapters may be in the model at once.
        max_bytes: how many bytes their tensors may take; None: any number.
        timeout: for how many seconds to wait for room while other threads use all that are there.
        **options: of ``load_adapter``, such as ``strict``, ``token`` or ``subfolder``.

    Raises:
        ValueError: capacity or max_bytes leaves no room.
        FileError: the folder does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Where | Mapping[str, Where] | Callable[[str], Where],
        capacity: int = 16,
        max_bytes: int | None = None,
        timeout: float = 0.0,
        **options: Any,
    ) -> None:
        for name, value in (("capacity", capacity), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} leaves no room for an adapter; give 1 or more")
        if isinstance(source, (str, os.PathLike)) and not Path(source).is_dir():
            raise FileError(
                f"there is no folder {source}; give the folder in which each adapter has a folder "
                "of its own, or a mapping of names to folders or hub ids"
            )
        self.model = model if isinstance(model, PeftModel) else PeftModel.around(model)
        self.source, self.options = source, options
        self.capacity, self.max_bytes, self.timeout = capacity, max_bytes, timeout
        self.hits = self.misses = self.evictions = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # bytes; the one used last is last
        self._uses: Counter[str] = Counter()  # blocks that are using an adapter now
        self._room = threading.Condition(threading.RLock())

    # -- using

    def use(self, name: str) -> Lease:
        """Within the block, in this thread, an adapter is active: ``with cache.use("a") as model:``

        Raises:
            StateError: there is no such adapter, or no room for it.
            FileError: it does not fit the model.
        """
        return Lease(self, (name,), None)

    def rows(self, names: Sequence[str]) -> Lease:
        """Within the block, in this thread, each row of a batch has its own adapter.

        Args:
            names: one for each row; ``"__base__"`` for none.

        Raises:
            StateError: there is no such adapter, or no room for all of them.
            FileError: one does not fit the model.
        """
        return Lease(self, tuple(dict.fromkeys(n for n in names if n != BASE)), tuple(names))

    def load(self, *names: str) -> None:
        """Load adapters before they are needed."""
        with self._room:
            self._take(names)
            self._release(names)

    # -- what is there

    @property
    def loaded(self) -> list[str]:
        """The adapters that it has in the model, the one that was used longest ago first."""
        with self._room:
            return list(self._known())

    @property
    def nbytes(self) -> int:
        """The bytes of their tensors."""
        with self._room:
            return sum(self._known().values())

    def names(self) -> list[str]:
        """The adapters that can be loaded, where the source says which; a function does not."""
        if isinstance(self.source, Mapping):
            return sorted(self.source)
        if callable(self.source):
            return sorted(self._sizes)
        return sorted(p.parent.name for p in Path(self.source).glob(f"*/{CONFIG_NAME}"))

    def __repr__(self) -> str:
        return (
            f"AdapterCache({len(self.loaded)} of {self.capacity} adapters, {self.nbytes:,} bytes, "
            f"{self.hits} hits, {self.misses} misses, {self.evictions} evictions)"
        )

    # -- making room

    def evict(self, *names: str) -> None:
        """Take adapters out of the model, for example since their files have changed.

        Raises:
            StateError: one is in use, or not there.
        """
        with self._room:
            for name in names:
                if name not in self._known():
                    raise StateError(
                        f"the cache has not loaded {name!r}{did_you_mean(name, self._sizes)}; it "
                        f"has {list(self._sizes)}"
                    )
                if self._busy(name):
                    raise StateError(
                        f"{name!r} is in use: leave its block, or set_adapter() another one first"
                    )
                self._drop(name)

    def clear(self) -> None:
        """Take all adapters out of the model that are not in use."""
        with self._room:
            self.evict(*[name for name in self._known() if not self._busy(name)])

    def _known(self) -> OrderedDict[str, int]:
        """What it has loaded; the user may have deleted some of them."""
        for name in [n for n in self._sizes if n not in self.model.peft_config]:
            del self._sizes[name]
        return self._sizes

    def _busy(self, name: str) -> bool:
        switch = self.model.base_model.switch
        return self._uses[name] > 0 or name in switch.active or name in switch.merged

    def _drop(self, name: str) -> None:
        self.model.delete_adapter(name)
        del self._sizes[name]
        self.evictions += 1

    def _take(self, names: Sequence[str]) -> None:
        """Have adapters in the model and hold them there; all of them or none."""
        if len(set(names)) > self.capacity:
            raise StateError(
                f"{len(set(names))} adapters are wanted at once and the cache holds "
                f"{self.capacity}; make capacity larger, or the batch smaller"
            )
        taken: list[str] = []
        try:
            for name in names:
                missed = name not in self.model.peft_config and self._load(name)
                self.misses, self.hits = self.misses + missed, self.hits + (not missed)
                if name in self._sizes:
                    self._sizes.move_to_end(name)
                self._uses[name] += 1
                taken.append(name)
        except BaseException:
            self._release(taken)
            raise

    def _release(self, names: Sequence[str]) -> None:
        self._uses.subtract(names)
        self._uses = +self._uses
        self._room.notify_all()

    def _load(self, name: str) -> bool:
        """Load an adapter, unless another thread does so while this one waits for room."""
        where = self._where(name)
        self._make_room(name, self._file_size(where))
        if name in self.model.peft_config:
            return False
        switch = self.model.base_model.switch
        with switch.change(name):  # and nobody else activates one meanwhile
            active, enabled = switch.active, switch.enabled
            switch.activate(enabled=enabled and bool(active))  # a model's first adapter is active
            try:
                self.model.load_adapter(where, name, **self.options)
            finally:
                switch.activate(active, enabled)
        self._sizes[name] = size = self._size(name)
        if self.max_bytes is not None and size > self.max_bytes:
            self._drop(name)
            raise StateError(
                f"{name!r} takes {size:,} bytes, more than max_bytes={self.max_bytes:,}; make it "
                "larger"
            )
        self._uses[name] += 1
        try:
            self._make_room(name, 0)
        finally:
            self._uses[name] -= 1
        return True

    def _make_room(self, name: str, more: int) -> None:
        """Evict what was used longest ago until an adapter has room."""

        def full() -> bool:
            known, room = self._known(), self.capacity - (name not in self._sizes)
            large = self.max_bytes is not None and sum(known.values()) + more > self.max_bytes
            return len(known) > room or (large and bool(known.keys() - {name}))

        def idle() -> str | None:
            return next((n for n in self._known() if not self._busy(n)), None)

        while full():
            oldest = self._room.wait_for(idle, self.timeout)
            if oldest is None:
                raise StateError(
                    f"there is no room for {name!r}: all of {list(self._sizes)} are in use. Make "
                    "capacity or max_bytes larger, leave a block of use() or rows() first, or "
                    "give a timeout for which to wait"
                )
            self._drop(oldest)

    def _where(self, name: str) -> Where:
        check_name(name, ())
        if callable(self.source):
            return self.source(name)
        if isinstance(self.source, Mapping):
            found = self.source.get(name)
        else:  # a name is no path: it may come from whoever sends a request
            folder = Path(self.source) / name
            inside = Path(name).name == name and (folder / CONFIG_NAME).is_file()
            found = folder if inside else None
        if found is None:
            names = self.names()
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise StateError(
                f"there is no adapter {name!r} in the cache's source{did_you_mean(name, names)}; "
                f"it has {names[:8]}{more}"
            )
        return found

    def _file_size(self, where: Where) -> int:
        if self.max_bytes is None or not os.path.isdir(where):
            return 0
        source = Source(where, self.options.get("subfolder"))

        def size() -> int:
            return 0 if (path := source.find(WEIGHTS)) is None else path.stat().st_size

        return settled(source.at, size)

    def _size(self, name: str) -> int:
        own = (p for n, p in parts(self.model.get_base_model()) if n == name)
        every = [t for part in own for t in (*part.parameters(), *part.buffers())]
        return sum({id(t): t.nbytes for t in every}.values())


class Lease:
    """A block in which adapters of a cache are used; they stay in the model until it is left."""

    def __init__(
        self, cache: AdapterCache, names: tuple[str, ...], rows: tuple[str, ...] | None
    ) -> None:
        self.cache, self.names, self.rows = cache, names, rows
        self.stack: ExitStack | None = None

    def __enter__(self) -> PeftModel:
        if self.stack is not None:
            raise StateError("this block was entered before; call use() or rows() again")
        cache, self.stack = self.cache, ExitStack()
        with cache._room:
            cache._take(self.names)
        with ExitStack() as stack:
            stack.callback(self._leave)
            root = cache.model.base_model
            if self.rows is None:
                stack.enter_context(root.using(*self.names))
            else:
                stack.enter_context(root.using(rows=self.rows))
                stack.enter_context(each_forward(root, self.names))
            self.stack = stack.pop_all()
        return cache.model

    def _leave(self) -> None:
        with self.cache._room:
            self.cache._release(self.names)

    def __exit__(self, *error: Any) -> None:
        assert self.stack is not None
        self.stack.close()

    def __del__(self) -> None:
        if self.__dict__.get("stack", self) is None:
            warn(
                "use() and rows() of an AdapterCache have an effect within their block alone: "
                "write `with cache.use(...) as model:`"
            )
