"""The whole pipeline on tiny models: it learns, its folder suffices, and it resumes to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftwork.errors import TrainingError
from graftwork.train import bundle, loop, use
from graftwork.train.recipe import RecipeError, build
from graftwork.train.run import Result, StoppedError, resumed, train
from graftwork.train.show import Silent

FAST = {"batch_size": 8, "learning_rate": 1e-2, "precision": "fp32"}


def run(**settings: Any) -> Result:
    recipe, _ = build({**FAST, **settings})
    return train(recipe, Silent())


def test_a_classifier_learns_and_its_folder_suffices(
    bert: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reviews)  # relative paths must hold from elsewhere
    found = run(
        model=str(bert), data="train.csv", test_data="test.csv", epochs=6, output=tmp_path / "out"
    )
    assert found.after["accuracy"] > max(0.9, found.before["accuracy"])
    monkeypatch.chdir(tmp_path)
    adapted = use.load("out")
    again = use.evaluate(adapted, None)
    assert again.metrics == pytest.approx(found.after)
    assert again.count == 40 and not again.changed
    predictions, long = use.predict(adapted, ["the film was great", "very dull the plot"])
    assert [p.label for p in predictions] == ["good", "bad"] and long == 0
    assert sum(predictions[0].probabilities.values()) == pytest.approx(1)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(RecipeError, match="graft predict"):
        use.generate(adapted, "hello", 5, 0.0, 0)


def test_only_the_adapter_and_the_head_are_trained(
    bert: Path, reviews: Path, tmp_path: Path
) -> None:
    found = run(model=str(bert), data=str(reviews), steps=2, output=str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("classifier" in name for name in tensors)
    assert all("lora_" in name or "classifier" in name for name in tensors)
    assert sum(t.numel() for t in tensors.values()) == found.prepared.plan.trainable


def test_answers_are_learnt_and_written(llama: Path, answers: Path, tmp_path: Path) -> None:
    found = run(model=str(llama), data=str(answers), epochs=12, output=str(tmp_path / "out"))
    assert found.prepared.corpus.task.name == "instruction"
    assert found.after["loss"] < found.before["loss"] / 3
    adapted = use.load(tmp_path / "out")
    assert use.evaluate(adapted, None).metrics == pytest.approx(found.after, rel=1e-4)
    assert use.generate(adapted, "say good fine", 8, 0.0, 0) == "fine good"
    with pytest.raises(RecipeError, match="graft generate"):
        use.predict(adapted, ["hello"])


def test_plain_text_is_learnt(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("the film was good and the plot was fine\n" * 40, encoding="utf-8")
    found = run(model=str(llama), data=str(file), epochs=8, output=str(tmp_path / "out"))
    assert found.prepared.corpus.task.name == "language"
    assert found.after["perplexity"] < found.before["perplexity"] / 4
    assert any("also occur" in remark for remark in found.prepared.remarks)


def test_the_same_seed_gives_the_same_bits(bert: Path, reviews: Path, tmp_path: Path) -> None:
    first, second = (
        run(model=str(bert), data=str(reviews), steps=3, output=str(tmp_path / name))
        for name in "ab"
    )
    assert first.after == second.after
    assert same(tmp_path / "a", tmp_path / "b")


def same(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


class StopAfter(Silent):
    """Asks for a stop after some steps, as Ctrl-C does."""

    def __init__(self, step: int, ask: Callable[[], None]) -> None:
        self.at, self.ask = step, ask

    def step(self, number: int, loss: float | None) -> None:
        if number == self.at:
            self.ask()


METHODS = {
    "lora": {"method": "LORA", "lora_dropout": 0.2},
    "dora": {"method": "LORA", "use_dora": True},
    "adalora": {"method": "ADALORA", "lora_dropout": 0.1, "init_r": 6, "target_r": 3},
    "ia3": {"method": "IA3"},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop_at", [5, 15, 20])  # in an epoch, at its end, in the next
def test_a_stopped_run_resumes_to_the_bits_of_an_unbroken_one(
    name: str, stop_at: int, bert: Path, reviews: Path, tmp_path: Path
) -> None:
    import os
    import signal

    settings = {
        **FAST, **METHODS[name], "model": str(bert), "data": str(reviews / "train.csv"),
        "test_data": str(reviews / "test.csv"), "epochs": 2,
    }  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(build({**settings, "output": str(whole)})[0], Silent())
    screen = StopAfter(stop_at, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedError, match=f"(?s)after step {stop_at} of 30.*--resume"):
        train(build({**settings, "output": str(broken)})[0], screen)
    assert not broken.exists() and (tmp_path / "broken.partial" / "recipe.json").is_file()
    result = train(resumed({"output": str(broken)}), Silent(), resume=True)
    assert same(whole, broken)
    assert bundle.read(broken).metrics["after"] == bundle.read(whole).metrics["after"]
    assert result.before == bundle.read(whole).metrics["before"]
    assert not (tmp_path / "broken.partial").exists()


def test_a_run_that_broke_off_after_its_last_step_only_finishes(
    bert: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FAST, "model": str(bert), "data": str(reviews), "steps": 4}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(build({**settings, "output": str(whole)})[0], Silent())

    def crash(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("graftwork.train.run._written", crash)
        with pytest.raises(KeyboardInterrupt):
            train(build({**settings, "output": str(broken)})[0], Silent())
    assert loop.last_checkpoint(tmp_path / "broken.partial") is not None
    train(resumed({"output": str(broken)}), Silent(), resume=True)
    assert same(whole, broken)


def test_resume_wants_the_same_recipe(bert: Path, reviews: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    settings = {**FAST, "model": str(bert), "data": str(reviews), "steps": 6, "output": out}
    import os
    import signal

    with pytest.raises(StoppedError):
        train(build(settings)[0], StopAfter(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(RecipeError, match="batch_size was 8 and is now 4"):
        resumed({"output": out, "batch_size": 4})
    with pytest.raises(RecipeError, match="--resume, or start again with --overwrite"):
        train(build(settings)[0], Silent())
    assert resumed(settings) == resumed({"output": out})
    run(**{**settings, "overwrite": True})
    with pytest.raises(RecipeError, match="finished"):
        resumed({"output": out})
    with pytest.raises(RecipeError, match="no unfinished training"):
        resumed({"output": str(tmp_path / "other")})
    with pytest.raises(RecipeError, match="--resume needs --output"):
        resumed({})


def test_a_loss_that_is_no_number_stops_and_leaves_nothing(
    bert: Path, reviews: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"at step \d+ of .*lower rate"):
        run(
            model=str(bert), data=str(reviews), epochs=5, output=str(tmp_path / "out"),
            learning_rate=1e30, warmup=0, max_grad_norm=1e30,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_other_things_in_the_output_folder_are_not_touched(
    bert: Path, reviews: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match=r"already holds other things \(notes.txt\)"):
            run(
                model=str(bert), data=str(reviews), output=str(tmp_path), steps=1,
                overwrite=overwrite,
            )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    out = tmp_path / "out"
    run(model=str(bert), data=str(reviews), output=str(out), steps=1)
    with pytest.raises(RecipeError, match="--overwrite"):
        run(model=str(bert), data=str(reviews), output=str(out), steps=2)
    run(model=str(bert), data=str(reviews), output=str(out), steps=2, overwrite=True)
    assert json.loads((out / "graftwork.json").read_text())["recipe"]["steps"] == 2


def test_modules_that_the_base_lacks_are_trained_and_saved(reviews: Path, tmp_path: Path) -> None:
    import transformers

    from train import toys

    words = toys.tokenizer("bert")
    config = transformers.DistilBertConfig(
        vocab_size=len(words), dim=32, n_layers=2, n_heads=2, hidden_dim=48,
        max_position_embeddings=32,
    )  # fmt: skip
    base = toys._saved(transformers.DistilBertModel(config), words, tmp_path / "base")
    found = run(model=str(base), data=str(reviews), epochs=2, output=str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("pre_classifier" in name for name in tensors)
    again = use.evaluate(use.load(tmp_path / "out"), None)
    assert again.metrics == pytest.approx(found.after)
