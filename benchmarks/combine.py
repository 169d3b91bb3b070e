"""What it costs to combine two LoRAs of rank 64 on one linear layer of 4096 x 4096.

    python benchmarks/combine.py [--peft]

Milliseconds, the median of several, and the largest tensor that is made on the way, in shares of
the layer's weight. With ``--peft`` the real peft beside it, once: it takes the SVD of the dense
update, which lasts a minute.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOW: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 64},
    "magnitude_prune": {"density": 0.2},
    "dare_linear": {"density": 0.2},
    "ties": {"density": 0.2},
}


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that is made within."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what comes out."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return out


def two(library: Any, size: int, rank: int) -> Any:
    """A model of one layer with two adapters, x and y."""
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    config = library.LoraConfig(r=rank, target_modules=["0"])
    model = library.get_peft_model(model, config, "x")
    model.add_adapter("y", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.shape != (size, size):
                p.normal_(std=0.02)
    return model


def seconds(model: Any, how: str) -> float:
    """One combination, taken away again."""
    began = time.perf_counter()
    model.add_weighted_adapter(["x", "y"], [0.7, 0.3], "new", how, **HOW[how])
    took = time.perf_counter() - began
    model.delete_adapter("new")
    return took


def main() -> None:
    """Print one line for each way."""
    parser = argparse.ArgumentParser(description="two LoRAs combined, on one layer")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peft", action="store_true", help="also time the real peft, once")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = two(importlib.import_module("graftwork"), args.size, args.rank)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for how in HOW:
        with Largest() as seen:
            seconds(model, how)
        took = 1e3 * median(seconds(model, how) for _ in range(args.repeats))
        print(f"{how:<16}{took:>8.1f} ms   {seen.size / (4 * args.size**2):.3f}")
    if args.peft:
        theirs = two(importlib.import_module("peft"), args.size, args.rank)
        for how in ("svd", "linear"):
            print(f"{'peft ' + how:<16}{1e3 * seconds(theirs, how):>8.1f} ms")


if __name__ == "__main__":
    main()
