"""What a training step asks of a GPU: kernels, their time, and memory above the model.

    python benchmarks/launches.py

For the shape that ``step.py --device cuda`` measures, and its variants; kernels and their time are
the profiler's, for one step after three others. It needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import step

VARIANTS = ("floor", "peft", "peft-dropout", "ours", "ours-dropout", "ours-dora")


def launched(run: Callable[[], None]) -> tuple[int, float]:
    """Kernels of a step, and milliseconds that they take together."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    times = [event.device_time for event in profiler.events() if event.device_type == cuda]
    return len(times), sum(times) / 1e3


def peak(run: Callable[[], None]) -> float:
    """The most gigabytes that a step holds beyond what is held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU that torch can use; step.py runs on a CPU")
    shape = step.shape(2048, "bfloat16", "cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{shape}\n")
    print(f"{'':<14} kernels   GPU ms   peak GB")
    for name, run in step.runners(step.possible(VARIANTS), shape).items():
        count, milliseconds = launched(run)
        print(f"{name:<14} {count:>7,} {milliseconds:>8.1f} {peak(run):>9.2f}", flush=True)


if __name__ == "__main__":
    main()
