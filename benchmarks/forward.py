"""What one adapter that is not merged adds to a forward, beside the real peft.

    python benchmarks/run.py --only forward

Evaluation without gradients, 1,024 tokens, r=8 on all linear layers, interleaved.
"""

from __future__ import annotations

from typing import Any

import torch

import step

BOUNDS = {256: 1.10, 1024: 1.05}  # on a CPU; a GPU only waits at such sizes


def forwards(at: step.Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of the base's forward, and of it with an adapter of either library."""
    names = ["floor", "ours", *(["peft"] if step.has_peft() else [])]
    models = {name: step.awake(step.MODELS[name](at.base())).eval() for name in names}
    ids = at.batch()

    def run(name: str) -> None:
        with torch.no_grad():
            models[name](input_ids=ids, use_cache=False)

    return step.interleaved({n: lambda n=n: run(n) for n in names}, rounds, at.device)


def rows(quick: bool = False, device: str = "cpu") -> list[dict[str, Any]]:
    """A row for each width, and for each dtype that the machine multiplies."""
    unit = device != "cpu" or bool(step.bf16_units())
    found = []
    for width, bound in BOUNDS.items():
        for dtype in ["float32", *(["bfloat16"] if unit else [])]:
            layers = step.LAYERS[width]  # as on a CPU, so that the rows are the same everywhere
            at = step.shape(width, dtype, device, layers=2 if quick else layers, length=128)
            times = forwards(at, 3 if quick else 15)
            short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
            found.append(
                {
                    "name": f"one unmerged adapter / base, forward, width {width}, {short}",
                    "peft": step.ratio(times, "peft", "floor"),
                    "ours": step.ratio(times, "ours", "floor"),
                    "unit": "ratio",
                    "bound": bound if device == "cpu" else None,
                }
            )
    return found
