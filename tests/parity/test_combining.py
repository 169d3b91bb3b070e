"""PEFT's rules of combination, by ``compat="peft"``, against the real peft; and its conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftwork
from graftwork.testing.bench import shake
from tiny import build, run

peft = pytest.importorskip("peft", reason="the real peft is the oracle of these tests")
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
RULES = "linear cat svd ties ties_svd magnitude_prune magnitude_prune_svd".split()


def two(folder: Path) -> tuple[Any, Any]:
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(**OPTIONS), "x").eval()
    theirs.add_adapter("y", peft.LoraConfig(**OPTIONS))
    for name in "xy":
        theirs.set_adapter(name)
        shake(theirs, seed=ord(name))
    theirs.save_pretrained(folder)
    ours = graftwork.PeftModel.from_pretrained(build("llama"), folder / "x", adapter_name="x")
    ours.load_adapter(folder / "y", "y")
    return theirs, ours


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -0.4]])
def test_rules_are_pefts(how: str, weights: list[float], tmp_path: Path) -> None:
    theirs, ours = two(tmp_path)
    options = {"density": 0.5} if "ties" in how or "prune" in how else {}
    theirs.add_weighted_adapter(["x", "y"], weights, "new", how, **options)
    ours.add_weighted_adapter(["x", "y"], weights, "new", how, **options, compat="peft")
    theirs.set_adapter("new")
    ours.set_adapter("new")
    torch.testing.assert_close(run(ours, "llama"), run(theirs, "llama"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_exact_rules_agree_without_compat(how: str, tmp_path: Path) -> None:
    theirs, ours = two(tmp_path)
    theirs.add_weighted_adapter(["x", "y"], [1.0, 0.7], "new", how)
    ours.add_weighted_adapter(["x", "y"], [1.0, 0.7], "new", how)
    theirs.set_adapter("new")
    ours.set_adapter("new")
    torch.testing.assert_close(run(ours, "llama"), run(theirs, "llama"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 0.9])
def test_conversion_is_pefts(rank: int | float, tmp_path: Path) -> None:
    options = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model(build("llama"), peft.LoHaConfig(**options)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "loha")
    ours = graftwork.PeftModel.from_pretrained(build("llama"), tmp_path / "loha")
    peft.save_as_lora(tmp_path / "theirs", theirs, rank)
    graftwork.save_as_lora(tmp_path / "ours", ours, rank)
    assert list(ours.peft_config) == ["default"]
    answers = []
    for library in (peft, graftwork):
        for folder in ("theirs", "ours"):
            model = library.PeftModel.from_pretrained(build("llama"), tmp_path / folder).eval()
            answers.append(run(model, "llama"))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-3, atol=1e-4)
