"""Prompts of embeddings beside the real peft: starts, files both ways, answers, training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graftwork
from graftwork.testing.bench import shake

from .rows import FIVE, METHODS, PLACES, TASKS, Method, batch, build, real

peft = pytest.importorskip("peft", reason="the real peft is the oracle of these tests")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about themselves

CASES = [
    (name, family, task)
    for name, method in METHODS.items()
    for family, task in PLACES
    if (task == "CAUSAL_LM" or not method.causal)
    and not (name == "tasks" and task == "QUESTION_ANS")  # PEFT loses the task ids there
]
TRAINED = [
    case for case in CASES if case[1:] != ("bert", "TOKEN_CLS") and case[2] != "QUESTION_ANS"
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def attached(library: Any, method: Method, family: str, task: str) -> Any:
    """A new adapter, from the same seed in both libraries."""
    base = build(family, task)
    torch.manual_seed(7)
    config = getattr(library, method.kind)(task_type=task, **copy.deepcopy(method.options))
    return library.get_peft_model(base, config).eval()


def call(model: nn.Module, method: Method, task: str) -> Any:
    """The output for the batch; PEFT changes the type mask that it is given."""
    given = {k: v.clone() for k, v in {**batch(task), **method.call}.items()}
    return model(**given)


@torch.no_grad()
def answer(model: nn.Module, method: Method, task: str) -> tuple[Tensor, Tensor]:
    out = call(model, method, task)
    loss = out.loss if out.get("loss") is not None else torch.zeros(())
    return real(out, batch(task)["attention_mask"]), loss


def layout(folder: Path) -> dict[str, tuple[Any, ...]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


@pytest.mark.parametrize(("name", "family", "task"), CASES)
def test_starts_answers_and_files_are_those_of_peft(
    name: str, family: str, task: str, tmp_path: Path
) -> None:
    method, answers = METHODS[name], {}
    for library in (graftwork, peft):
        model, folder = attached(library, method, family, task), tmp_path / library.__name__
        answers["start", library.__name__] = answer(model, method, task)
        with torch.no_grad():
            shake(model, seed=3)
        if method.causal and library is graftwork:  # PEFT does it in the forward
            model.base_model.switch.shared["default"].project()
        want = answer(model, method, task)
        model.save_pretrained(folder)
        for reader in (graftwork, peft):
            read = reader.PeftModel.from_pretrained(build(family, task), folder).eval()
            for mine, theirs in zip(answer(read, method, task), want, strict=True):
                torch.testing.assert_close(mine, theirs, **CLOSE)
    first, second = (answers["start", lib.__name__] for lib in (graftwork, peft))
    torch.testing.assert_close(first, second, **CLOSE)
    assert layout(tmp_path / "graftwork") == layout(tmp_path / "peft")
    ours, theirs = (
        json.loads((tmp_path / n / "adapter_config.json").read_text())
        for n in ("graftwork", "peft")
    )
    assert ours.keys() == theirs.keys()
    apart = {k for k in ours if ours[k] != theirs[k]} - {"base_model_name_or_path"}
    assert apart <= {"modules_to_save"}  # which PEFT writes twice


@pytest.mark.parametrize(("name", "family", "task"), TRAINED)
def test_twenty_steps_are_those_of_peft(name: str, family: str, task: str, tmp_path: Path) -> None:
    method, losses = METHODS[name], {}
    for library in (graftwork, peft):
        model = attached(library, method, family, task).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, seen = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1), []
        for _ in range(20):
            loss = call(model, method, task).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses[library.__name__] = seen
        model.eval().save_pretrained(tmp_path / library.__name__)  # PEFT saves what dropout leaves
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in losses)
    assert losses["graftwork"][-1] < losses["graftwork"][0]
    assert losses["graftwork"] == pytest.approx(losses["peft"], abs=1e-4)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]
)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_trained_multitask_prompt_is_the_start(kind: str, suffix: str, tmp_path: Path) -> None:
    source = attached(graftwork, METHODS["tasks"], "llama", "CAUSAL_LM")
    with torch.no_grad():
        shake(source)
    source.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    if suffix == "bin":
        torch.save(load_file(path), path := tmp_path / "source.bin")
    options = {
        **FIVE, "num_ranks": 2, "prompt_tuning_init": kind, "prompt_tuning_init_task": 1,
        "prompt_tuning_init_state_dict_path": str(path),
    }  # fmt: skip
    method = Method("MultitaskPromptTuningConfig", options, {"task_ids": torch.tensor([0, 0])})
    found = [attached(library, method, "llama", "CAUSAL_LM") for library in (graftwork, peft)]
    first, second = (answer(model, method, "CAUSAL_LM") for model in found)
    torch.testing.assert_close(first, second, **CLOSE)
    found[0].save_pretrained(tmp_path / "new")
    path.unlink()  # the file is needed where training starts, and nowhere else
    again = graftwork.PeftModel.from_pretrained(build("llama", "CAUSAL_LM"), tmp_path / "new")
    torch.testing.assert_close(answer(again, method, "CAUSAL_LM"), first)


def test_what_peft_saved_is_trained_on(tmp_path: Path) -> None:
    attached(peft, METHODS["tasks"], "llama", "CAUSAL_LM").save_pretrained(tmp_path / "tasks")
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(
            build("llama", "CAUSAL_LM"), tmp_path / "tasks", is_trainable=True
        )
    model = graftwork.PeftModel.from_pretrained(
        build("llama", "CAUSAL_LM"), tmp_path / "tasks", is_trainable=True
    )
    model(**batch("CAUSAL_LM"), **TASKS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_peft_has_no_loss_with_its_own_default_types() -> None:
    method = Method("CPTConfig", {"cpt_token_ids": [5, 6, 7]}, causal=True)
    assert answer(attached(peft, method, "llama", "CAUSAL_LM"), method, "CAUSAL_LM")[1].isnan()
    ours = attached(graftwork, method, "llama", "CAUSAL_LM")
    loss = answer(ours, method, "CAUSAL_LM")[1]
    plain = graftwork.get_peft_model(
        build("llama", "CAUSAL_LM"),
        graftwork.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    with torch.no_grad():
        plain.base_model.switch.shared["default"].E.copy_(
            ours.base_model.switch.shared["default"].E
        )
    torch.testing.assert_close(loss, answer(plain, method, "CAUSAL_LM")[1])
