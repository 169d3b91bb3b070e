"""Whether training comes out as plain LoRA: losses and adapters after 50 steps.

    python benchmarks/run.py --only losses

From the same start, on the same batches, with AdamW: the largest relative difference of a loss, and
that of all adapters' entries together (by norm), from LoRA written out in plain torch
(``step.Plain``).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import step

STEPS = 50
BOUNDS = {"float32": 1e-5, "bfloat16": 2**-8}  # of losses and adapters: bf16 rounds to 8 bits


def state(library: str, model: Any) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names."""
    if library == "plain":
        return {f"base_model.model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = importlib.import_module(library).get_peft_model_state_dict(model)
    return found


def trained(library: str, at: step.Shape, start: dict[str, Tensor] | None, steps: int) -> Any:
    """Losses, adapter and its start, after some steps from a start or from its own."""
    model = step.awake(step.MODELS[{"graftwork": "ours"}.get(library, library)](at.base()))
    if start is not None:
        importlib.import_module(library).set_peft_model_state_dict(model, start)
    begun = {name: t.detach().clone() for name, t in state(library, model).items()}
    optimizer = torch.optim.AdamW(step.unfrozen(model), lr=1e-3)
    losses = []
    for turn in range(steps):
        loss = step.loss_of(model, at.batch(turn))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: t.detach() for name, t in state(library, model).items()}, begun


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The norm of the difference, relative to b's.

    Raises:
        SystemExit: they do not hold the same tensors.
    """
    if a.keys() != b.keys():
        raise SystemExit(f"not the same adapter: {sorted(a.keys() ^ b.keys())[:4]}")
    gap = sum(float((a[n].double() - b[n].double()).norm() ** 2) for n in b)
    return float((gap / sum(float(t.double().norm() ** 2) for t in b.values())) ** 0.5)


def rows(quick: bool = False, device: str = "cpu") -> list[dict[str, Any]]:
    """A row for the losses and one for the adapters, in each dtype."""
    found, steps = [], 5 if quick else STEPS
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        at = step.Shape(128, 2, 344, 512, 4, 4, 32, dtype, device)
        losses, adapter, start = trained("plain", at, None, steps)
        gaps: dict[str, tuple[float, float]] = {}
        for library in ("graftwork", *(["peft"] if step.has_peft() else [])):
            other, values, _ = trained(library, at, start, steps)
            worst = max(abs(a - b) / abs(b) for a, b in zip(other, losses, strict=True))
            gaps[library] = (worst, apart(values, adapter))
        for which, what in enumerate(("losses", "adapters")):
            found.append(
                {
                    "name": f"{what} after {steps} steps against plain LoRA, {short}",
                    "peft": gaps["peft"][which] if "peft" in gaps else None,
                    "ours": gaps["graftwork"][which],
                    "unit": "relative difference",
                    "bound": BOUNDS[dtype],
                }
            )
    return found
