"""Prompts through the pipeline: every method trains, is used and resumes, or is refused before."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graftwork.errors import TargetError
from graftwork.prompts.starts import embedded
from graftwork.train import base, plan, show, use
from graftwork.train.options import OptionError
from graftwork.train.prepare import Prepared, prepare
from graftwork.train.recipe import RecipeError, build
from graftwork.train.run import StoppedError, resumed, train
from graftwork.train.show import Silent
from train import toys

FEW = {"num_virtual_tokens": 4}
EXAMPLE = {"cpt_token_ids": [17, 18, 5, 6], "cpt_tokens_type_mask": [1, 2, 3, 4]}
METHODS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": FEW,
    "P_TUNING": FEW,
    "MULTITASK_PROMPT_TUNING": FEW,
    "CPT": EXAMPLE,
    "PREFIX_TUNING": {**FEW, "prefix_projection": True},
    "P_TUNING_V2": FEW,
    "CARTRIDGE": FEW,
    "ADAPTION_PROMPT": {"adapter_len": 4},
}
AT_INPUT = ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"]


def settings(method: str, **more: Any) -> dict[str, Any]:
    fast = {"batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "steps": 4}
    return {**fast, "method": method, **METHODS[method], **more}


def ready(method: str, **more: Any) -> Prepared:
    return prepare(build(settings(method, **more))[0], lambda text: None)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"CPT"}))
def test_a_classifier_of_prompts_is_trained_and_used(
    method: str, bert: Path, reviews: Path, tmp_path: Path
) -> None:
    given = settings(method, model=bert, data=reviews, output=tmp_path / "out")
    found = train(build(given)[0], Silent())
    adapted = use.load(tmp_path / "out")
    assert use.evaluate(adapted, None).metrics == pytest.approx(found.after)
    predictions, _ = use.predict(adapted, ["the film was great", "dull " * 50])
    assert {p.label for p in predictions} <= {"good", "bad"}


@pytest.mark.parametrize("method", METHODS)
def test_a_language_model_with_a_prompt_learns_writes_and_resumes(
    method: str, llama: Path, answers: Path, tmp_path: Path
) -> None:
    given = settings(method, model=llama, data=answers)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    found = train(build({**given, "output": whole})[0], Silent())
    adapted = use.load(whole)
    assert use.evaluate(adapted, None).metrics == pytest.approx(found.after, rel=1e-5)
    assert len(use.generate(adapted, "say good fine", 3, 0.0, 0).split()) <= 3

    class Stop(Silent):
        def step(self, number: int, loss: float | None) -> None:
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        train(build({**given, "output": broken})[0], Stop())
    train(resumed({"output": str(broken)}), Silent(), resume=True)
    one, other = (load_file(f / "adapter_model.safetensors") for f in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_virtual_tokens_leave_fewer_positions_for_a_text(
    bert: Path, llama: Path, reviews: Path, answers: Path
) -> None:
    found = ready("PROMPT_TUNING", model=bert, data=reviews)
    assert found.spec.max_length == 32 - 4
    assert dict(show.plan_lines(found))["length"] == "at most 28 tokens and 4 virtual ones"
    # keys in front move tokens where they are a cache's, as in PEFT; BERT has none
    assert ready("PREFIX_TUNING", model=bert, data=reviews).spec.max_length == 32
    for method in METHODS.keys() - {"ADAPTION_PROMPT"}:
        assert ready(method, model=llama, data=answers).spec.max_length == 64 - 4, method
    assert ready("ADAPTION_PROMPT", model=llama, data=answers).spec.max_length == 64
    with pytest.raises(RecipeError, match="at most 32 tokens, 4 of them virtual, so 28 of a text"):
        ready("PROMPT_TUNING", model=bert, data=reviews, max_length=29)
    with pytest.raises(RecipeError, match="30 virtual tokens leave 2 of the base model's 32 pos"):
        ready("PROMPT_TUNING", model=bert, data=reviews, num_virtual_tokens=30)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_the_longest_sample_and_answer_fit_a_table_of_positions(
    method: str, tmp_path: Path
) -> None:
    import transformers

    words = toys.tokenizer("llama")
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=24, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    toys._saved(transformers.GPT2LMHeadModel(config), words, tmp_path / "gpt2")
    data = tmp_path / "long.txt"
    data.write_text("\n".join(["very " * 60] * 12), encoding="utf-8")
    out = tmp_path / "out"
    found = train(
        build(settings(method, model=tmp_path / "gpt2", data=data, output=out))[0], Silent()
    )
    assert max(found.prepared.train.samples.lengths()) == 20
    adapted = use.load(out)
    use.generate(adapted, "good", 100, 0.0, 0)
    with pytest.raises(RecipeError, match="has 21 tokens behind 4 virtual ones and the model tak"):
        use.generate(adapted, "good " * 20, 1, 0.0, 0)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"CPT"}))
def test_the_plan_says_where_a_prompt_is(method: str, bert: Path, reviews: Path) -> None:
    found = ready(method, model=bert, data=reviews)
    places = 1 if method in AT_INPUT or method == "ADAPTION_PROMPT" else 2  # not the new head
    told, made = dict(show.plan_lines(found))["method"], show.plan_json(found)
    where = {1: "at 1 place", 2: "at 2 places"}[places]
    where = "at the input" if method in AT_INPUT else where
    assert told.startswith(f"{method} {where} (") and made["layers"] == places
    assert made["virtual_tokens"] == (0 if method == "ADAPTION_PROMPT" else 4)
    random = [remark for remark in found.remarks if "initialize_kv_prefix_from_text" in remark]
    assert len(random) == (method == "CARTRIDGE")


def test_the_estimate_counts_virtual_tokens(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.txt"
    data.write_text("\n".join(["very " * 60] * 12), encoding="utf-8")
    found = ready("PROMPT_TUNING", model=llama, data=data, batch_size=1, num_virtual_tokens=20)
    samples, pad = found.train.samples, found.tokenizer.pad_token_id
    longest = {k: t.repeat(1, 4)[:, :120] for k, t in plan.collate([samples[0]], pad).items()}
    samples.items[0].ids.resize(120, refcheck=False)
    samples.items[0].labels.resize(120, refcheck=False)  # type: ignore[union-attr]
    found.model.train()
    kept = plan._kept(found.model, longest, "fp32")
    told = plan.estimate(found.model, samples, found.recipe, pad, "fp32", 20).activations
    assert told == pytest.approx(kept, rel=0.05)
    blind = plan.estimate(found.model, samples, found.recipe, pad, "fp32").activations
    assert abs(blind - kept) > 2 * abs(told - kept)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "CPT for labels": (settings("CPT"), "CPT does not learn the task classification like this"),
    "CPT without examples": (
        {"method": "CPT", "task": "language"}, "--cpt-token-ids is missing: CPT begins",
    ),
    "tasks without numbers": (
        settings("MULTITASK_PROMPT_TUNING", num_tasks=3), "--num-tasks: each row would need",
    ),
    "skills without numbers": ({"method": "POLY", "n_tasks": 2}, "--n-tasks: each row would need"),
    "labels of a text": (
        settings("PROMPT_TUNING", prompt_tuning_init="LABELS", task="language"),
        "needs prompt_tuning_init_labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_prompt_cannot_learn_is_refused_before_anything_is_loaded(
    name: str, bert: Path, llama: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, text = WRONG[name]
    monkeypatch.setattr(base, "load_model", lambda *args: pytest.fail("the model was loaded"))
    model = llama if given.get("task") == "language" else bert
    with pytest.raises(RecipeError, match=text):
        prepare(build({"model": model, "data": reviews, **given})[0], lambda text: None)


def test_a_prompt_starts_as_a_text_or_as_the_labels(bert: Path, reviews: Path) -> None:
    found = ready(
        "PROMPT_TUNING", model=bert, data=reviews, prompt_tuning_init="TEXT",
        prompt_tuning_init_text="good, the film",
    )  # fmt: skip
    shared: Any = found.model.base_model.switch.shared["default"]
    ids = found.tokenizer("good, the film")["input_ids"][:4]
    assert torch.equal(shared.E, embedded(shared, ids))
    found = ready("PROMPT_TUNING", model=bert, data=reviews, prompt_tuning_init="LABELS")
    shared = found.model.base_model.switch.shared["default"]
    ids = found.tokenizer.convert_tokens_to_ids(["bad", "good"])
    assert torch.equal(shared.E[:2], embedded(shared, ids))


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("CPT", {"cpt_token_ids": [99], "cpt_tokens_type_mask": None}, "token 99 is not in the mo"),
        ("PROMPT_TUNING", {"token_dim": 16}, "token_dim=16, and model.embed_tokens gives 32"),
        ("PREFIX_TUNING", {"num_layers": 9}, "num_layers=9, and a LlamaForCausalLM has 2"),
    ],
)
def test_options_that_do_not_fit_the_base_model_are_told(
    method: str, options: dict[str, Any], text: str, llama: Path, answers: Path
) -> None:
    with pytest.raises((OptionError, TargetError), match=text):
        ready(method, model=llama, data=answers, **options)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_classifies_with_a_prompt(
    kind: str, reviews: Path, tmp_path: Path
) -> None:
    import transformers

    words = toys.tokenizer("bert")
    ends = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
    if kind == "bart":
        sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
        stacks = {f"{p}_{k}": n for p in ("encoder", "decoder") for k, n in sizes.items()}
        config: Any = transformers.BartConfig(
            **ends, **stacks, d_model=16, decoder_start_token_id=2, max_position_embeddings=32
        )
        model: nn.Module = transformers.BartModel(config)
    else:
        config = transformers.T5Config(
            **ends, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    toys._saved(model, words, tmp_path / kind)
    given = settings("PROMPT_TUNING", model=tmp_path / kind, data=reviews, output=tmp_path / "out")
    found = train(build(given)[0], Silent())
    assert use.evaluate(use.load(tmp_path / "out"), None).metrics == pytest.approx(found.after)
    assert dict(show.plan_lines(found.prepared))["method"].startswith("PROMPT_TUNING at the input")
