"""Every method: files cross both ways with the real peft, answers agree, training takes the same
steps.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import graftwork
from graftwork.testing.bench import shake
from specs import PARITY, Parity
from tiny import IDS, MODELS, build

peft = pytest.importorskip("peft", reason="the real peft is the oracle of these tests")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about themselves

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def ids(cases: list[Parity]) -> list[str]:
    return [case.id for case in cases]


@torch.no_grad()
def answer(model: nn.Module, case: Parity) -> torch.Tensor:
    torch.manual_seed(0)
    out = model(**MODELS[case.model][1], **case.call)
    return out if isinstance(out, torch.Tensor) else out.logits


def saved(library: Any, case: Parity, folder: Path) -> Any:
    """A model of a library with a new adapter, moved from its start and saved."""
    torch.manual_seed(0)
    config = getattr(library, case.kind)(**case.options)
    model = library.get_peft_model(build(case.model), config).eval()
    shake(model, case.shake, seed=3)
    model.save_pretrained(folder)
    return model


def layout(folder: Path) -> dict[str, tuple[Any, ...]]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}


READ = [case for case in PARITY if case.reads]
WRITTEN = [case for case in PARITY if case.writes]
TRAINED = [case for case in PARITY if case.train]


@pytest.mark.parametrize("case", READ, ids=ids(READ))
def test_what_peft_writes_is_read(case: Parity, tmp_path: Path) -> None:
    theirs = saved(peft, case, tmp_path)
    ours = graftwork.PeftModel.from_pretrained(build(case.model), tmp_path)
    base = answer(build(case.model), Parity(case.model, case.kind))
    want, got = answer(theirs, case), answer(ours, case)
    assert not torch.allclose(want, base, atol=1e-4), "the adapter has no effect"
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("case", WRITTEN, ids=ids(WRITTEN))
def test_what_is_written_peft_reads(case: Parity, tmp_path: Path) -> None:
    ours = saved(graftwork, case, tmp_path / "ours")
    saved(peft, case, tmp_path / "theirs")
    assert layout(tmp_path / "ours") == layout(tmp_path / "theirs")
    configs = [
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")
    ]
    assert configs[0].keys() == configs[1].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(case.model), tmp_path / "ours").eval()
    want, got = answer(ours, case), answer(theirs, case)
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("case", TRAINED, ids=ids(TRAINED))
def test_training_takes_the_same_steps(case: Parity, tmp_path: Path) -> None:
    theirs = saved(peft, case, tmp_path).train()
    ours = graftwork.PeftModel.from_pretrained(
        build(case.model), tmp_path, is_trainable=True
    ).train()
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (theirs, ours)]
    assert sum(p.numel() for p in trained[0]) == sum(p.numel() for p in trained[1])
    optimizers = [torch.optim.SGD(parameters, lr=0.05) for parameters in trained]
    losses: list[list[float]] = []
    for _ in range(20):
        losses.append([])
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS, **case.call).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    for step, (a, b) in enumerate(losses):
        assert b == pytest.approx(a, abs=1e-4), step
    assert losses[-1][1] < losses[0][1], "nothing is learnt"
