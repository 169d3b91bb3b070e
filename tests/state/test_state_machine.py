"""Random sequences of operations find no difference between a model and the reference."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ground import Op
from hypothesis import settings, stateful
from hypothesis import strategies as st
from machine import explore
from proposals import propose
from world import World
from zoo import METHODS

FAULTS = "A3 A8 A9 A10 C2 C3 C4 D3 D4 D5 E1 E3 F4 F7"


def shows(*ids: str) -> Callable[[Any], Any]:
    """Mark a test with several faults."""

    def mark(test: Any) -> Any:
        for one in ids:
            test = pytest.mark.fault(one)(test)
        return test

    return mark


@shows(*FAULTS.split())
@pytest.mark.parametrize("seed", [0, 500])
def test_random_sequences(seed: int) -> None:
    found = explore(1200, seed)
    assert found["steps"] >= 1200 and found["refusals"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_fifty_thousand_steps(part: int) -> None:
    found = explore(10_000, 10_000 * (part + 1))
    assert found["steps"] >= 10_000 and len(METHODS) >= 12
    assert len(found["operations"]) == 23, "every operation was among them"


class Machine(stateful.RuleBasedStateMachine):
    """The same, driven by hypothesis, which looks for short sequences by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.done: list[Op] = []

    @stateful.initialize(seed=st.integers(0, 2**12))
    def begin(self, seed: int) -> None:
        self.world = World(seed, self.folder)

    @stateful.rule(seed=st.integers(0, 2**20))
    def step(self, seed: int) -> None:
        op = propose(random.Random(seed), self.world)
        self.done.append(op)
        self.world.apply(op)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestHypothesis = Machine.TestCase
TestHypothesis.settings = settings(
    max_examples=12, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
