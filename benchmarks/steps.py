"""The rows of a training step for ``make bench``; benchmarks/step.py measures.

python benchmarks/run.py --only steps
"""

from __future__ import annotations

from typing import Any

import step

LIBRARIES = ("peft", "ours")
WITHOUT_UNIT = "this CPU has no unit for bf16"
# (width, dtype): at most so much of the floor, without and with dropout
FLOORS = {
    (512, "float32"): (1.10, 1.20),
    (512, "bfloat16"): (1.18, 1.35),
    (1024, "bfloat16"): (1.10, 1.22),
    (2048, "bfloat16"): (None, None),  # the GPU's
}
COSTS = ("full", "full+adamw", "peft+adamw", "ours+adamw")  # which no row of width 512 needs
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def row(name: str, peft: float | None, ours: float | None, bound: float | None) -> dict[str, Any]:
    """One ratio; None of ours says that this machine cannot measure it."""
    made = {"name": name, "peft": peft, "ours": ours, "unit": "ratio", "bound": bound}
    return made if ours is not None else made | {"note": WITHOUT_UNIT}


def rows(quick: bool = False, device: str = "cpu") -> list[dict[str, Any]]:
    """Every row of a step.

    Args:
        quick: three rounds of small models, to see that it runs.
        device: "cpu", with the shapes of the table, or "cuda", with one that fills a GPU.
    """
    unit = device != "cpu" or bool(step.bf16_units())
    at = [(2048, "bfloat16")] if device != "cpu" else [k for k in FLOORS if k[0] < 2048]
    if not unit:
        at.append((1024, "float32"))  # at least that
    found = []
    for width, dtype in at:
        result = None
        if unit or dtype == "float32":
            smaller = {"layers": 2, "rows": 2} if quick else {}
            shape = step.shape(width, dtype, device, **smaller)
            kinds = step.USUAL if width > 512 else [v for v in step.USUAL if v not in COSTS]
            result = step.measure(shape, 3 if quick else 9, kinds)
            print(step.table(result), flush=True)
        found += of_a_shape(result, width, dtype)
    return found


def of_a_shape(result: step.Result | None, width: int, dtype: str) -> list[dict[str, Any]]:
    """The rows of one shape; empty ones where nothing was measured."""
    plain, dropped = FLOORS.get((width, dtype), (None, None))
    where = f"width {width}, {SHORT[dtype]}"

    def both(of: str, to: str = "floor") -> tuple[float | None, float | None]:
        if result is None:
            return None, None
        mate = to if to in ("floor", "full", "full+adamw") else f"peft{to[4:]}"
        return result.of(f"peft{of}", mate), result.of(f"ours{of}", to)

    found = [
        row(f"step / floor, {where}, dropout 0", *both(""), plain),
        row(f"step / floor, {where}, dropout 0.05", *both("-dropout"), dropped),
    ]
    if width > 512:
        bounds = (0.80, 0.65) if (width, dtype) == (1024, "bfloat16") else (None, None)
        name = f"LoRA step / full fine-tuning step, {where}"
        found += [
            row(f"{name}, without optimizer", *both("", "full"), bounds[0]),
            row(f"{name}, with AdamW", *both("+adamw", "full+adamw"), bounds[1]),
        ]
    found.append(row(f"DoRA step / LoRA step, {where}", *both("-dora", "ours"), 1.15))
    if width in (512, 2048):
        bounds = (1.25, 1.30) if dtype == "bfloat16" else (None, None)
        for of, dropout, bound in (("", "0", bounds[0]), ("-dropout", "0.05", bounds[1])):
            pair = [result.saved_ratio(f"{lib}{of}") if result else None for lib in LIBRARIES]
            found.append(
                row(f"bytes saved for backward / floor's, {where}, dropout {dropout}", *pair, bound)
            )
    return found
