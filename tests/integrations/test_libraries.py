"""Other libraries under ``as_peft()``: each program runs once so and once with the real peft, and
both report the same losses, outputs, files and kinds of errors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SIDES = ["graftwork", "peft"] if find_spec("peft") else ["graftwork"]


def both(program: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a program reports here and with the real peft, where that is installed."""
    paths = [HERE.parents[1] / "src", HERE.parent, HERE]
    found: dict[str, Any] = {}
    for side in SIDES:
        (folder / side).mkdir()
        env = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(HERE / f"{program}.py"), side, str(folder / side)],
            env={**os.environ, **env, "HF_HOME": str(folder / side / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[side] = json.loads(done.stdout.strip().splitlines()[-1])
        for name, value in found[side].items():
            broken = isinstance(value, dict) and "error" in value
            assert not broken, f"{side}, {name}: {value}"
    return found["graftwork"], found.get("peft", found["graftwork"])


def differences(ours: Any, theirs: Any, at: str = "") -> Iterator[str]:
    """Where two reports differ; numbers by more than 1e-5."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from differences(ours[key], theirs[key], f"{at}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{at}[{i}]")
    elif isinstance(ours, float) and isinstance(theirs, float | int):
        if not abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs)):
            yield f"{at}: {ours} here, {theirs} in peft"
    elif ours != theirs:
        yield f"{at}: {ours} here, {theirs} in peft"


def run(program: str, folder: Path, own: dict[str, Any]) -> dict[str, Any]:
    """Run a program twice and compare; ``own``: what is better here than in peft, as it must be."""
    ours, theirs = both(program, folder)
    assert ours.pop("the_page") == "it runs"
    for name, want in own.items():
        got = ours.pop(name)
        want = pytest.approx(want, abs=1e-6) if isinstance(want, float) else want
        assert got == want, name
        theirs.pop(name, None)
    assert list(differences(ours, theirs)) == []
    return ours


@pytest.mark.slow
@pytest.mark.fault("I5")
@pytest.mark.fault("A1")
@pytest.mark.fault("A8")
@pytest.mark.fault("A12")
@pytest.mark.fault("F6")
@pytest.mark.fault("F7")
def test_transformers_own_adapters(tmp_path: Path) -> None:
    better = {
        "refused": [True, True, ["default"]], "trains_after_loading": 0, "compilations": 0,
        "other_rank": True, "other_alpha": True,
    }  # fmt: skip
    found = run("native_more_program", tmp_path, better)
    wrapped = found["saved_and_loaded"]
    assert all(one == pytest.approx(wrapped["logits"][0], abs=1e-5) for one in wrapped["logits"])
    assert wrapped["inside"][0] == pytest.approx(wrapped["inside"][1], abs=1e-5)
    assert wrapped["texts"][0] != wrapped["texts"][1], "the pipeline has the adapter"
    first, again = found["classifier"]
    assert first == pytest.approx(again, abs=1e-5)


@pytest.mark.slow
@pytest.mark.fault("I5")
@pytest.mark.fault("A8")
@pytest.mark.fault("A9")
@pytest.mark.fault("C11")
@pytest.mark.fault("C12")
def test_the_trainers_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl")
    better = {
        "untouched_by_sending": True, "resumed_as_one": 0.0, "state_restored": True,
        "first_divergence": 0.0,
    }  # fmt: skip
    found = run("trl_program", tmp_path, better)
    losses, names, frozen, ref, loaded = found["dpo_against_an_adapter"]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "the reference is the adapter as it was"
    assert frozen and ref == loaded and names == [["default", "ref"], "default"]
    before, _, off, after, base = found["dpo_with_two_loaded_adapters"][:5]
    assert before == after != off == base
    losses, _, (on, off), refused = found["sft_with_a_head"]
    assert losses[0] != losses[1] and on != off and refused == "ValueError"
    assert len({str(one) for one in found["sft_with_a_config"]["logits"][:3]}) == 1
    _, first, again, name = found["reward_model"]
    assert first == pytest.approx(again, abs=1e-5) and name.endswith("score.weight")


@pytest.mark.slow
@pytest.mark.fault("I5")
@pytest.mark.fault("F6")
@pytest.mark.fault("F7")
def test_the_adapters_of_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    found = run("diffusers_program", tmp_path, {"uneven": 0.0})
    loaded, swapped = found["loaded_and_weighted"], found["hotswapped"]
    assert loaded["one"][0] == loaded["one_again"] and loaded["unloaded"][0] == loaded["base"]
    assert loaded["one"][0] != loaded["base"] and loaded["layers"] == [0, 0]
    for name in ("large", "small"):
        for got in swapped[f"swapped {name}"]:
            assert got == pytest.approx(swapped[name], abs=1e-5)
    assert swapped["compilations"] == 0
    assert found["fused"]["kept"][0] == pytest.approx(found["fused"]["half"][0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.fault("I5")
@pytest.mark.fault("A8")
@pytest.mark.fault("A9")
def test_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    better = {"trains_after_loading": 0, "resumed_as_one": 0.0, "resaved": True}
    found = run("sentences_program", tmp_path, better)
    want, again, other = found["trained_saved_loaded"]["same"]
    assert want == pytest.approx(again, abs=1e-5) and want == pytest.approx(other, abs=1e-5)
    model, beside, merged, plain = found["loaded_from_a_wrapped_model"]
    for one in (beside, merged, plain):
        assert one == pytest.approx(model, abs=1e-5)
    before, on, loaded, off = found["sparse_encoder"]
    assert on == pytest.approx(loaded, abs=1e-5) and on != before == off
