"""Products with few columns: torch's plain one beside the form that the fast path takes.

    python benchmarks/thin.py [--tokens 1024]

Milliseconds in fp32, medians of eleven, interleaved; ``x W'`` is the layer's own product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from graftwork.fast.thin import across, narrow

WIDTHS, RANKS, ROUNDS, CALLS = (256, 512, 1024, 1376), (4, 8, 12, 16, 24, 32), 11, 10


def times(forms: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """Milliseconds of each."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            began = time.perf_counter()
            for _ in range(CALLS):
                form()
            found[name].append((time.perf_counter() - began) / CALLS * 1e3)
    return {name: median(own) for name, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, default=1024)
    n = parser.parse_args().tokens
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {n} tokens, ms")
    names = ["x W'", "x A'", "ours", "g B", "ours", "g' s", "ours"]
    print("width rank " + "".join(f"{name:>8}" for name in names))
    for width in WIDTHS:
        x, w = torch.randn(n, width), torch.randn(width, width)
        for r in RANKS:
            a, b, s = torch.randn(r, width), torch.randn(width, r), torch.randn(n, r)
            forms: dict[str, Callable[[], torch.Tensor]] = {
                "own": lambda x=x, w=w: torch.mm(x, w.t()),
                "down": lambda x=x, a=a: torch.mm(x, a.t()),
                "down here": lambda x=x, a=a: narrow(x, a.t()),
                "back": lambda x=x, b=b: torch.mm(x, b),
                "back here": lambda x=x, b=b: narrow(x, b),
                "grad": lambda x=x, s=s: torch.mm(s.t(), x),
                "grad here": lambda x=x, s=s: across(s, x),
            }
            row = "".join(f"{ms:8.3f}" for ms in times(forms).values())
            print(f"{width:5} {r:4} {row}")


if __name__ == "__main__":
    main()
