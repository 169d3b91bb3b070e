"""Folders: what lies beside an adapter, and what is said where it cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftwork.errors import FileError
from graftwork.train import base, bundle, use
from graftwork.train.recipe import RecipeError, build
from graftwork.train.run import train
from graftwork.train.show import Silent


@pytest.fixture(scope="module")
def trained(bert: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    base_copy = shutil.copytree(bert, folder / "base")
    recipe, _ = build(
        {"model": base_copy, "data": reviews, "output": folder / "out", "steps": 2, "r": 4}
    )
    train(recipe, Silent())
    return folder


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of an adapter's folder with another note."""
    shutil.copytree(folder / "out", to)
    note = json.loads((to / bundle.NOTE).read_text())
    (to / bundle.NOTE).write_text(json.dumps({**note, **changes}))
    return to


def test_the_note_holds_what_was_used(trained: Path, reviews: Path) -> None:
    note = bundle.read(trained / "out")
    assert note.spec.labels == ("bad", "good") and note.base == str(trained / "base")
    assert note.recipe.data == str(reviews) and note.recipe.method_options == {"r": 4}
    content = json.loads((trained / "out" / bundle.NOTE).read_text())
    assert {"torch", "transformers", "datasets"} == content["versions"].keys()


def test_a_folder_can_be_moved(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained / "out", tmp_path / "elsewhere")
    assert use.predict(use.load(moved), ["the film was good"])[0][0].label in ("bad", "good")


def test_other_data_is_measured_by_the_same_columns(trained: Path, tmp_path: Path) -> None:
    adapted = use.load(trained / "out")
    file = tmp_path / "d.csv"
    file.write_text("text,label\nthe film,good\n" + "very " * 40 + ",bad\n")
    found = use.evaluate(adapted, str(file))
    assert (found.count, found.long, found.changed) == (2, 1, False)
    file.write_text("text,label\nthe film,mixed\n")
    with pytest.raises(RecipeError, match=r"d\.csv has 1 label that training does not: 'mixed'"):
        use.evaluate(adapted, str(file))


def test_what_cannot_be_loaded_is_explained(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no folder .*outt; did you mean 'out'"):
        use.load(trained / "outt")
    with pytest.raises(RecipeError, match="holds no adapter"):
        use.load(trained / "base")
    gone = changed(trained, tmp_path / "gone", base=str(tmp_path / "moved-away"))
    with pytest.raises(RecipeError, match=r"base model .*moved-away, which is not there any more"):
        use.load(gone)
    newer = changed(trained, tmp_path / "newer", format=99)
    with pytest.raises(RecipeError, match="is newer than this one"):
        use.load(newer)
    damaged = changed(trained, tmp_path / "damaged", spec={"task": "x"})
    with pytest.raises(RecipeError, match=r"graftwork\.json is damaged"):
        use.load(damaged)
    (damaged / bundle.NOTE).unlink()
    with pytest.raises(RecipeError, match="not one that `graft train` wrote"):
        use.load(damaged)
    (gone / bundle.NOTE).write_text((trained / "out" / bundle.NOTE).read_text())
    (gone / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(FileError, match="damaged or no safetensors file"):
        use.load(gone)


def test_pairs_are_measured_not_predicted(bert: Path, tmp_path: Path) -> None:
    rows = "\n".join(f"the film {i},a plot {i},{'yes' if i % 2 else 'no'}" for i in range(20))
    (tmp_path / "d.csv").write_text(f"sentence1,sentence2,label\n{rows}\n")
    recipe, _ = build(
        {"model": bert, "data": tmp_path / "d.csv", "steps": 1, "output": tmp_path / "o"}
    )
    train(recipe, Silent())
    adapted = use.load(tmp_path / "o")
    assert use.evaluate(adapted, None).count == 2
    with pytest.raises(RecipeError, match="takes pairs of texts; measure it"):
        use.predict(adapted, ["one"])


WRONG_BASES = {
    "a missing folder": ("./nowhere", "there is no folder ./nowhere"),
    "a file": ("{tmp}/file", "is a file; give the model's folder"),
    "an empty folder": ("{tmp}/empty", "has no config.json, so it is no model's folder"),
    "an adapter": ("{trained}/out", "is an adapter, not a base model"),
    "an unknown hub id": ("some-org/some-model", "the hub does not give a model of that name"),
    "a broken config": ("{tmp}/broken", "cannot be loaded: "),
}


@pytest.mark.parametrize("name", WRONG_BASES)
def test_a_base_that_cannot_be_loaded_is_explained(
    name: str, trained: Path, reviews: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "none-such"}')
    model, text = WRONG_BASES[name]
    recipe, _ = build(
        {"model": model.format(tmp=tmp_path, trained=trained), "data": reviews,
         "output": tmp_path / "out"}
    )  # fmt: skip
    with pytest.raises(RecipeError, match=text):
        train(recipe, Silent())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_model_that_cannot_write_learns_no_language(bert: Path, answers: Path) -> None:
    from graftwork.train.prepare import prepare

    recipe, _ = build({"model": bert, "data": answers})
    with pytest.raises(
        RecipeError, match="is a bert, which does not write text from left to right"
    ):
        prepare(recipe, lambda text: None)


def test_the_precision_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert base.choose_precision("fp16") == "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for abilities, wanted in (({"amx_bf16": True}, "bf16"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)  # noqa: B023
        assert base.choose_precision("auto") == wanted
