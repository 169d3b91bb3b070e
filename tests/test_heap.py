"""Memory that is freed stays with the process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import ClassVar

import pytest

from graftwork.fast import heap

PROGRAM = """
import resource, torch
from graftwork.fast import heap
print(heap.keep())
def work():
    every = [torch.ones(1 << 20) for _ in range(25)]  # 4 MB each
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
work(), work()
print(min(faults() for _ in range(3)))
"""


def ran() -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k not in heap.VARIABLES}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this is not glibc")
def test_what_is_freed_is_there_again_without_a_fault() -> None:
    told, faults = ran()
    assert told == "True" and int(faults) < 1000  # without it 25,000 or none, by chance


def test_both_bounds_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        asked: ClassVar[list[tuple[int, int]]] = []
        answers = True

        def mallopt(self, what: int, value: int) -> bool:
            self.asked.append((what, value))
            return self.answers

    for name in heap.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    assert heap.keep() and Library.asked == [(-1, 2**31 - 1), (-3, 2**25)]
    Library.answers = False
    assert not heap.keep()


def test_the_environment_has_its_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("the allocator was asked"))
    assert not heap.keep()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.keep()


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not heap.keep()
