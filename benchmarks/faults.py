"""Pages that a training step gets from the system again, and what they cost.

    python benchmarks/faults.py [--keep]

Medians of five steps of each variant, at width 512 in fp32; with ``--keep`` glibc keeps what is
freed, as in the other benchmarks. Without it the numbers depend on how the heap happens to lie.
"""

from __future__ import annotations

import argparse
import resource
import time
from statistics import median

import torch

import step
from graftwork.fast import heap


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="let glibc keep what is freed")
    if parser.parse_args().keep and not heap.keep():
        raise SystemExit("--keep: this is not glibc, or the environment says how it is to be")
    torch.set_num_threads(2)
    print(f"{'':<14}   faults   system ms   wall ms")
    runs = step.runners(["floor", "ours", "ours-dropout"], step.shape(512, "float32"))
    for run in runs.values():
        run()
        run()
    for name, run in runs.items():
        rows = []
        for _ in range(5):
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            run()
            wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
            faults, system = after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime
            rows.append((faults, system * 1e3, wall * 1e3))
        faults, system, wall = (median(column) for column in zip(*rows, strict=True))
        print(f"{name:<14} {faults:>8,.0f} {system:>11.0f} {wall:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
