"""Factors of runs that learn together lie in stacks, and nobody notices but the clock."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_together import alone, same, texts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graftwork import LoraConfig, Run, get_peft_model_state_dict, train_together
from tiny import build

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def learning(model: Any) -> list[Tensor]:
    """The tensors of all adapters."""
    return [p for p in model.parameters() if p.requires_grad]


def storages(tensors: list[Tensor]) -> int:
    """How many storages tensors are in."""
    return len({t.untyped_storage().data_ptr() for t in tensors})


class Copies(TorchDispatchMode):
    """Counts what is stacked or concatenated, by how many matrices that is."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.stack.default, torch.ops.aten.cat.default):
            self.counts[sum(t.ndim == 2 and t.is_floating_point() for t in args[0])] += 1
        return func(*args, **(kwargs or {}))


def test_no_step_puts_factors_or_their_gradients_together() -> None:
    model, mode, seen = build("llama"), Copies(), []

    def on_step(step: int, _: Any) -> None:
        if step == 2:
            mode.__enter__()
        if step == 4:
            mode.__exit__(None, None, None)
            seen.append(storages(learning(model)))

    runs = [Run(f"r{i}", CONFIG, seed=i, steps=5) for i in range(3)]
    train_together(model, runs, texts(3), on_step=on_step)
    assert mode.counts.total() and not mode.counts[3]
    assert seen == [sum(".adapters." in n for n, _ in model.named_parameters()) / 3]


@pytest.mark.parametrize("rows", [None, 4])
def test_runs_that_end_or_fail_in_the_middle_leave_the_others_as_alone(rows: int | None) -> None:
    data = texts(4)
    runs = [
        Run("short", CONFIG, seed=1, steps=3, learning_rate=5e-3),
        Run("failing", CONFIG, seed=2, steps=9, schedule=lambda n: math.nan if n == 4 else 1.0),
        Run("decayed", CONFIG, seed=3, steps=9, weight_decay=0.2, schedule="cosine", warmup=0.3),
        Run("summed", CONFIG, seed=4, steps=7, accumulation=2, max_grad_norm=None),
        Run("long", LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2), seed=5,
            steps=11, schedule="linear", max_grad_norm=0.1),
    ]  # fmt: skip
    found = train_together(build("llama"), runs, data, rows_at_once=rows)
    assert found["failing"].ended == "failed"
    for run in runs:
        if run.name != "failing":
            assert found[run.name].ended == "finished"
            same(found, run, alone(run, data))


def test_factors_own_their_storage_when_the_training_is_over() -> None:
    model = build("llama")
    runs = [Run(f"r{i}", CONFIG, seed=i, steps=4 + i) for i in range(3)]
    train_together(model, runs, texts(3))
    every = [p for n, p in model.named_parameters() if ".adapters." in n]
    assert storages(every) == len(every) > 3
    for p in every:
        assert p.is_contiguous() and p.grad is None
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    for module in model.modules():
        kept = getattr(module, "stacks", None)
        assert kept is None or (kept.stacks is None and not kept.results)


def test_they_do_so_when_the_training_breaks_off() -> None:
    model = build("llama")

    def on_step(step: int, _: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    runs = [Run(f"r{i}", CONFIG, seed=i, steps=5) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        train_together(model, runs, texts(3), on_step=on_step)
    every = [p for n, p in model.named_parameters() if ".adapters." in n]
    assert storages(every) == len(every) > 3


def test_an_adapter_is_saved_within_a_training_as_after_it(tmp_path: Path) -> None:
    root: list[Any] = []

    def evaluate(model: Any, name: str) -> float:
        root[:] = [model]
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
        return 0.0

    runs = [Run(f"r{i}", CONFIG, seed=i, steps=4) for i in range(3)]
    found = train_together(build("llama"), runs, texts(3), evaluate=evaluate, evaluate_every=2)
    for run in runs:
        file = next((tmp_path / run.name).rglob("*.safetensors"))
        saved = load_file(file)
        own = get_peft_model_state_dict(found.model, adapter_name=run.name)
        assert saved.keys() == own.keys()
        for key, tensor in own.items():
            torch.testing.assert_close(saved[key], tensor, rtol=0, atol=0)
        size = sum(t.numel() * t.element_size() for t in own.values())
        assert file.stat().st_size < size + 20_000


@pytest.mark.parametrize("moved", [False, True])
def test_what_is_written_into_an_adapter_within_a_training_counts(moved: bool) -> None:
    def on_step(step: int, _: Any) -> None:
        if step == 3:
            for name, p in model.named_parameters():
                if ".adapters.r1." in name:
                    if moved:
                        p.data = torch.zeros_like(p)
                    else:
                        p.data.zero_()

    model: Any = build("llama")
    runs = [Run(f"r{i}", CONFIG, seed=i, steps=4) for i in range(2)]
    found = train_together(model, runs, texts(4), on_step=on_step)
    plain = build("llama")
    with torch.no_grad():
        loss = plain(**texts(4)[3]).loss
    assert found["r1"].losses[-1] == pytest.approx(float(loss), abs=1e-5)
    assert found["r0"].losses[-1] != pytest.approx(float(loss), abs=1e-5)
