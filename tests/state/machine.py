"""Random sequences of operations on a model with adapters, each compared with the reference.

``python tests/state/machine.py --steps 50000 --json FILE`` runs as long as one likes. A failure
prints the shortest part of its sequence that still fails; ``replay`` takes it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ground import Op
from proposals import propose
from world import World
from zoo import METHODS, ZOO

LENGTH = 60  # operations of a sequence


class SequenceError(AssertionError):
    """A sequence at whose end the library and the reference do not agree."""


def play(seed: int, ops: Sequence[Op] | None = None, length: int = LENGTH) -> Counter[str]:
    """Run one sequence, drawn or given; its counts of operations.

    Raises:
        SequenceError: it diverges; the message has the shortest sequence that does.
    """
    done: list[Op] = []
    problem = _run(seed, ops, length, done, counts := Counter())
    if problem is None:
        return counts
    if ops is None:
        done, problem = _shortened(seed, done, problem)
    told = "".join(traceback.format_exception(problem)[-12:])
    each = "\n".join(f"    {op!r}," for op in done)
    raise SequenceError(f"replay(\n    {seed},\n{each}\n)\n{told}")


def replay(seed: int, *ops: Op) -> Counter[str]:
    """Run a sequence again that a failure has printed."""
    return play(seed, ops)


def _run(
    seed: int, ops: Sequence[Op] | None, length: int, done: list[Op], counts: Counter[str]
) -> Exception | None:
    """What goes wrong; ``done`` gets the operations, the last of which does."""
    drawn, folder = random.Random(seed), Path(tempfile.mkdtemp())
    world = World(seed, folder)
    try:
        for i in range(length if ops is None else len(ops)):
            op = propose(drawn, world) if ops is None else ops[i]
            done.append(op)
            world.apply(op)
        world.check_twin()
    except Exception as error:
        return error
    finally:
        counts.update(world.counts)
        shutil.rmtree(folder)
    return None


def _shortened(seed: int, ops: list[Op], problem: Exception) -> tuple[list[Op], Exception]:
    """The sequence without the operations that the same failure does not need."""
    size = len(ops) // 2
    while size:
        start, before = 0, len(ops)
        while start < len(ops):
            fewer, done = ops[:start] + ops[start + size :], []
            found = _run(seed, fewer, 0, done, Counter())
            if found is not None and _alike(found, problem):
                ops, problem = done, found
            else:
                start += size
        size = size // 2 if size > 1 or len(ops) == before else 1
    return ops, problem


def _alike(one: Exception, other: Exception) -> bool:
    return type(one) is type(other) and str(one)[:12] == str(other)[:12]


def explore(steps: int, seed: int = 0, length: int = LENGTH) -> dict[str, Any]:
    """Run sequences until they have so many steps; what was run."""
    counts: Counter[str] = Counter()
    sequences, begun = 0, time.process_time()
    while sum(counts.values()) - counts["refused"] < steps:
        counts += play(seed + sequences, length=length)
        sequences += 1
    refusals = counts.pop("refused")
    return {
        "steps": sum(counts.values()),
        "sequences": sequences,
        "methods": METHODS,
        "configs": len(ZOO),
        "refusals": refusals,
        "operations": dict(sorted(counts.items())),
        "first_seed": seed,
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence")
    parser.add_argument("--length", type=int, default=LENGTH, help="steps of a sequence")
    parser.add_argument("--json", type=Path, help="where the counts are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        found = explore(options.steps, options.seed, options.length)
    except SequenceError as failure:
        sys.exit(str(failure))
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
