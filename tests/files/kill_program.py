"""Kills saving: "random SHAPES KILLS SEED" at random moments, so often for each of these shapes
(or "all"); "every SHAPES" before and after each call that changes a file; "merge" the same of a
merged model in shards, "trainer KILLS SEED" a training that writes checkpoints. A fork of this
process saves an adapter over another one and dies of SIGKILL; what it leaves is loaded, and has to
be one of the two, bit for bit. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")

import merged  # noqa: E402
import trained  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402

from graftwork.files import atomic  # noqa: E402
from graftwork.merging import shards  # noqa: E402


@dataclass
class Tally:
    """What the kills have left."""

    kills: int = 0
    old: int = 0
    new: int = 0
    mixed: int = 0
    unreadable: int = 0
    strays: int = 0
    shapes: int = 0
    errors: list[str] = field(default_factory=list)


class Tried:
    """One shape: two adapters to save, and what a reader finds after each was saved."""

    def __init__(self, name: str, shape: Shape, where: Path) -> None:
        self.name, self.shape = name, shape
        self.folder = where / "adapter"
        self.savers = [shape.saver(which) for which in (0, 1)]
        self.found: list[str] = []
        self.took: float | None = None  # seconds that a save writes
        self.names: list[set[str]] = []
        for saver in self.savers:
            self.reset()
            saver(self.folder)
            self.found.append(self.read())
            self.names.append(listed(self.folder))
        assert self.found[0] != self.found[1], f"{name}: the two adapters are one"
        self.reset()
        shape.old(self.folder, self.savers[0])
        self.now = 0

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self) -> str:
        return hashlib.sha256(repr(self.shape.facts(self.folder)).encode()).hexdigest()

    def again(self) -> None:
        """Begin with the old form, where saving over it ends that."""
        if self.shape.once:
            self.reset()
            self.shape.old(self.folder, self.savers[0])
            self.now = 0

    def judge(self, tally: Tally, wanted: tuple[int, ...]) -> None:
        """What a kill has left."""
        tally.kills += 1
        try:
            found = self.read()
        except Exception as error:
            tally.unreadable += 1
            tally.errors.append(f"{self.name}: {type(error).__name__}: {error}"[:400])
            return
        if found not in [self.found[which] for which in wanted]:
            tally.mixed += 1
            tally.errors.append(f"{self.name}: mixed {sorted(listed(self.folder))}"[:400])
            return
        before, self.now = self.now, self.found.index(found)
        tally.old, tally.new = tally.old + (self.now == before), tally.new + (self.now != before)

    def close(self, tally: Tally) -> None:
        """A whole save after all kills: nothing is left over."""
        tally.shapes += 1
        self.savers[1](self.folder)
        if self.read() != self.found[1]:
            tally.mixed += 1
            tally.errors.append(f"{self.name}: not healed")
        if more := listed(self.folder) - self.names[1] - self.shape.kept:
            tally.strays += 1
            tally.errors.append(f"{self.name}: left over {sorted(more)[:5]}")


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(run: Callable[[], None]) -> int:
    """Start a child that does this and nothing else."""
    if (child := os.fork()) == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    return child


def killed(child: int) -> bool:
    """Wait for a child; whether it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "a save failed"
    return False


def at_random(names: list[str], each: int, seed: int) -> Tally:
    """So many kills of each shape."""
    tally, dice = Tally(), random.Random(seed)
    for name in names:
        with tempfile.TemporaryDirectory() as where:
            tried = Tried(name, SHAPES[name], Path(where))
            child, took = saving(tried, once=True)
            killed(child)
            for _ in range(each):
                tried.again()
                child, _ = saving(tried, once=tried.shape.once)
                time.sleep(dice.uniform(0, 1.5 * took))
                os.kill(child, signal.SIGKILL)
                killed(child)
                tried.judge(tally, (0, 1))
            tried.close(tally)
    return tally


def saving(tried: Tried, once: bool) -> tuple[int, float]:
    """A child that has just begun to write, and how long one does that whose end is waited for."""
    reading, writing = os.pipe()

    def run() -> None:
        real = atomic.Saving.__init__

        def told(*args: Any) -> None:
            os.write(writing, b".")
            real(*args)

        atomic.Saving.__init__ = told  # type: ignore[method-assign]
        for which in (1 - tried.now, tried.now) * 1000:
            tried.savers[which](tried.folder)
            if once:
                os._exit(0)

    child = forked(run)
    os.close(writing)
    os.read(reading, 1)
    start = time.perf_counter()
    if tried.took is None:
        os.read(reading, 1)  # until it ends, or begins anew
        tried.took = time.perf_counter() - start
    os.close(reading)
    return child, tried.took


def at_every_call(names: list[str]) -> Tally:
    """A kill before each call that changes a file, and within and after each writing."""
    tally = Tally()
    for name in names:
        with tempfile.TemporaryDirectory() as where:
            tried, at = Tried(name, SHAPES[name], Path(where)), 0
            while True:
                at += 1
                tried.again()

                def once(tried: Tried = tried, at: int = at) -> None:
                    with counted(at):
                        tried.savers[1 - tried.now](tried.folder)
                    os._exit(0)

                if not killed(forked(once)):
                    break
                tried.judge(tally, (tried.now, 1 - tried.now))
            assert at > 10, f"{name}: no more than {at} calls"
            tried.close(tally)
    return tally


CALLS = ("replace", "rename", "mkdir", "unlink", "rmdir", "remove", "fsync", "open")


@contextmanager
def counted(last: int) -> Iterator[None]:
    """In a child, which dies at the call of this number."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == last:
            die()

    def changed(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, changed(getattr(os, name)))

    def write(file: Any, data: bytes) -> None:
        step()
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            file.write(part)
            file.flush()
            step()
        os.fsync(file.fileno())
        step()

    def exchanged(*args: Any) -> bool:
        step()
        done = real_exchanged(*args)
        step()
        return done

    def put(*args: Any) -> None:
        step()
        real_put(*args)

    real_exchanged, real_put = atomic._exchanged, shards._put
    atomic._write, atomic._exchanged, shards._put = write, exchanged, put
    yield


def merging() -> Tally:
    """A merged model in shards over another one: plain readers find the one or the other."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as where:
        of, adapters = merged.prepare(Path(where))
        out, found = Path(where) / "out", []
        for adapter in adapters:
            merged.merge(of, adapter, out)
            found.append(merged.read(out))
        names, now, at = listed(Path(where)), 1, 0
        while True:
            at += 1

            def once(at: int = at, now: int = now) -> None:
                with counted(at):
                    merged.merge(of, adapters[1 - now], out)
                os._exit(0)

            if not killed(forked(once)):
                break
            tally.kills += 1
            try:
                after = found.index(merged.read(out))
            except (OSError, ValueError) as error:
                tally.unreadable, tally.mixed = tally.unreadable + 1, tally.mixed + 1
                tally.errors.append(f"{at}: {error!r}"[:300])
                break
            tally.old, tally.new = tally.old + (after == now), tally.new + (after != now)
            now = after
        tally.shapes, tally.strays = 1, len(listed(Path(where)) ^ names)
    return tally


def training(kills: int, seed: int) -> Tally:
    """A training that writes checkpoints: each is that of its step, or not there."""
    tally, dice = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as where:
        trained.train(Path(where) / "all")
        start = time.perf_counter()
        killed(forked(lambda: (trained.train(Path(where) / "again"), os._exit(0))))  # type: ignore
        took = time.perf_counter() - start
        wanted = trained.read(Path(where) / "all")
        for i in range(kills):
            folder = Path(where) / f"{i}"
            child = forked(lambda folder=folder: (trained.train(folder), os._exit(0)))  # type: ignore
            while not list(folder.glob("checkpoint-*")):
                time.sleep(0.0005)
            time.sleep(dice.uniform(0, 0.5) * took)
            os.kill(child, signal.SIGKILL)
            tally.kills += killed(child)
            try:
                found = trained.read(folder)
            except Exception as error:
                tally.unreadable += 1
                tally.errors.append(repr(error)[:300])
                continue
            tally.old += len(found)
            tally.mixed += any(wanted[step] != facts for step, facts in found.items())
            trained.train(folder)  # goes on from the newest whole one
            tally.strays += trained.read(folder)[max(wanted)] != wanted[max(wanted)]
            tally.new += 1
    tally.shapes = 1
    return tally


def main(how: str, *more: str) -> Tally:
    if how == "merge":
        return merging()
    if how == "trainer":
        return training(int(more[0]), int(more[1]))
    names = list(SHAPES) if more[0] == "all" else more[0].split(",")
    if how == "random":
        return at_random(names, int(more[1]), int(more[2]))
    return at_every_call(names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(vars(main(*sys.argv[1:]))))
