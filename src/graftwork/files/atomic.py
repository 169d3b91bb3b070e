"""Files of one folder, and of folders within it, replaced together: all of them, or none.

New files are written into a hidden folder within the folder. One rename commits them, that of a
file which names the hidden folder; then each takes its place. Who reads in between, after a crash
or while it happens, finds them by that name (``find``); the next save puts them into their places
before it does anything else. So a crash at any moment leaves what was there, or what was to be.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..config import CONFIG_NAME
from ..errors import FileError

T = TypeVar("T")

WEIGHTS = "adapter_model.safetensors"
COMMITTED = ".graftwork-saved"  # the file that names what is committed
STAGED = re.compile(r"\.graftwork-[0-9a-f]{16}")
DEAD = ".dead"  # what a crash has left, while it is removed
DEEP = 2  # an adapter in a folder of its own, and its parts in folders within
PATIENCE = 300.0  # seconds until another process is thought to hang
TRIES = 200  # readings of a folder that is written meanwhile
# how a system says that it has no locks, or cannot exchange names
NOT_HERE = {errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK, errno.EBADF}


class Saving:
    """A save into a folder, made where it is missing; one at a time where the system has locks.

    Args:
        folder: where to.

    Raises:
        FileError: it cannot be written; what was there is intact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.staged = folder, folder / f".graftwork-{secrets.token_hex(8)}"
        self.stale: list[Callable[[], None]] = []

    def put(self, name: str, data: bytes) -> None:
        """A new file; ``name``: its path within the folder."""
        path = self.staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            _write(file, data)

    def drop(self, within: str, patterns: Collection[str], kept: Collection[str]) -> None:
        """Remove, once all is in place, the files of such names that are not ``kept``."""

        def remove() -> None:
            for path in [p for x in patterns for p in (self.folder / within).glob(x)]:
                if path.name not in kept:
                    path.unlink(missing_ok=True)

        self.stale.append(remove)

    @contextmanager
    def begun(self) -> Iterator[Saving]:
        """Within the block files are put; at its end they are committed."""
        made: list[Path] = []
        try:
            made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                finish(self.folder)
                self.staged.mkdir()
                yield self
                self._commit()
                made = []
                self._place()
        except OSError as error:
            raise FileError(
                f"the adapter could not be saved in {self.folder}: {error}. What was there before "
                "is intact; choose another folder or make room"
            ) from error
        finally:
            if _committed(self.folder) != self.staged:
                shutil.rmtree(self.staged, ignore_errors=True)
            with suppress(OSError):  # another one uses them by now
                for path in made:
                    path.rmdir()

    def _commit(self) -> None:
        text = self.staged / COMMITTED
        with open(text, "xb") as file:
            _write(file, self.staged.name.encode())
        for where, _, _ in os.walk(self.staged):
            _sync(Path(where))
        os.replace(text, self.folder / COMMITTED)

    def _place(self) -> None:
        try:
            _sync(self.folder)
            finish(self.folder)
            for remove in self.stale:
                remove()
        except OSError as error:
            raise FileError(
                f"the adapter is saved in {self.folder} and can be loaded from there, but not all "
                f"files could be put into their places, where other programs look: {error}. Save "
                "it once more when that is mended"
            ) from error


def finish(folder: Path) -> None:
    """Put what is committed into its places, and remove what a crash has left."""
    if (staged := _committed(folder)) is not None:
        touched = {folder}
        for path in [p for p in staged.rglob("*") if p.is_file()]:
            target = folder / path.relative_to(staged)
            if _latest(path, target, folder) == path:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
                touched.add(target.parent)
        for one in touched:
            _sync(one)
    (folder / COMMITTED).unlink(missing_ok=True)
    for stray in folder.glob(".graftwork-*"):
        dead = stray if stray.suffix == DEAD else stray.with_name(stray.name + DEAD)
        with suppress(FileNotFoundError):
            os.replace(stray, dead)  # at once: nobody goes on writing into it
        shutil.rmtree(dead, ignore_errors=True)


def find(folder: Path, name: str) -> Path | None:
    """Where a file of a folder is now; None where there is none."""
    final = folder / name
    for place, staged in waiting(folder):
        if (staged / name).is_file():
            return _latest(staged / name, final, place)
    return final if final.is_file() else None


def is_folder(folder: Path) -> bool:
    """Whether there is such a folder now."""
    return folder.is_dir() or any(staged.is_dir() for _, staged in waiting(folder))


def waiting(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Where something is committed that a folder belongs to, and what waits there for it."""
    every = folder.absolute()
    for place in (every, *every.parents[:DEEP]):
        if (staged := _committed(place)) is not None:
            yield place, staged / every.relative_to(place)


def settled(folder: Path | None, read: Callable[[], T]) -> T:
    """What ``read`` finds in a folder; it reads again where that was written meanwhile.

    Args:
        folder: the folder; None: what never changes.
        read: reads files there.

    Raises:
        FileError: it is written all the time.
    """
    for attempt in range(TRIES if folder is not None else 0):
        assert folder is not None
        before = _state(folder)
        try:
            found = read()
        except Exception:
            if _state(folder) == before:
                raise
        else:
            if _state(folder) == before:
                return found
        time.sleep(0.001 * min(attempt, 20))
    if folder is None:
        return read()
    raise FileError(
        f"{folder} is written again and again, so that it cannot be read as a whole; load it once "
        "saving is done"
    )


def _state(folder: Path) -> list[Any]:
    """What differs as soon as something else is committed, or one of its files takes its place."""
    every = folder.absolute()
    places = [place / COMMITTED for place in (every, *every.parents[:DEEP])]
    found: list[Any] = []
    for path in [*places, every / CONFIG_NAME, every / WEIGHTS]:
        try:
            stat = path.stat()
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append(None)
    for _, staged in waiting(every):
        found.append(sorted((where, *sorted(names)) for where, _, names in os.walk(staged)))
    return found


def _committed(folder: Path) -> Path | None:
    """The hidden folder of what is committed and may not be in its places."""
    try:
        with open(folder / COMMITTED, encoding="ascii", errors="replace") as file:
            name = file.read(64)
    except OSError:
        return None
    return folder / name if STAGED.fullmatch(name) else None


def _latest(staged: Path, final: Path, folder: Path) -> Path:
    """Which of the two holds: another program may have written in its place since the commit."""
    try:
        newer = final.stat().st_mtime_ns > (folder / COMMITTED).stat().st_mtime_ns
    except FileNotFoundError:
        newer = not staged.exists()
    return final if newer else staged


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Within the block no other process saves into the folder, where the system has locks; a
    process that is killed holds none any more.

    Args:
        folder: the folder, which is there.
        patience: seconds to wait for another process.

    Raises:
        FileError: it has not ended by then.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        while not _taken(handle):
            if time.monotonic() > end:
                raise FileError(
                    f"another process is writing into {folder} (waited {patience:.0f} seconds for "
                    "it), so nothing was written; wait for its end, or name another folder"
                )
            time.sleep(0.01)
        yield
        fcntl.flock(handle, fcntl.LOCK_UN)  # also what a fork has inherited
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    return True


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of one at the end of the block, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def exchange(made: Path, target: Path) -> None:
    """Put a finished folder where another one may be, which is at ``made`` then. Where the system
    can exchange two names at once there is a whole folder at ``target`` at any moment.
    """
    if not target.exists():
        os.rename(made, target)
    elif not _exchanged(made, target):
        aside = made.with_name(f".{made.name}.aside")
        os.rename(target, aside)
        os.rename(made, target)
        os.rename(aside, made)
    _sync(target.parent)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether the system has exchanged two names."""
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if hasattr(library, "renameat2"):  # Linux; the numbers are AT_FDCWD and RENAME_EXCHANGE
        failed = library.renameat2(-100, names[0], -100, names[1], 2)
    elif hasattr(library, "renamex_np"):  # macOS; RENAME_SWAP
        failed = library.renamex_np(*names, 2)
    else:
        return False
    if failed and (number := ctypes.get_errno()) not in NOT_HERE:
        raise OSError(number, os.strerror(number), str(b))
    return not failed
