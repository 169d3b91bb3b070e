"""Training goes on bit for bit from what a folder holds beside PEFT's file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork import (
    FileError,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    StateError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from .rows import METHODS, Method, batch, build

TASK = "CAUSAL_LM"
PROJECTED = {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 12}
CASES = {**METHODS, "prefix": Method("PrefixTuningConfig", PROJECTED)}
BEHIND = ["mlp", "lstm", "prefix"]  # a network makes what the file holds


def attached(name: str) -> Any:
    import graftwork

    method = CASES[name]
    torch.manual_seed(5)
    config = getattr(graftwork, method.kind)(task_type=TASK, **method.options)
    return get_peft_model(build("llama", TASK), config)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def trained(model: Any, optimizer: torch.optim.Optimizer, name: str, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(**batch(TASK), **CASES[name].call).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = attached(name).train()
    optimizer = optimizer_of(model)
    trained(model, optimizer, name, 4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama", TASK), tmp_path, is_trainable=True).train()
    second = optimizer_of(again)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = []
    for one, steps in ((model, optimizer), (again, second)):
        torch.manual_seed(6)
        losses.append(trained(one, steps, name, 4))
    assert losses[0] == losses[1]
    first, other = ({n: p for n, p in m.named_parameters()} for m in (model, again))
    assert first.keys() == other.keys()
    assert all(torch.equal(first[n], other[n]) for n in first)
    kept = [f for f in tmp_path.iterdir() if f.name.startswith("training_state-")]
    assert bool(kept) == (name in [*BEHIND, "cpt", "cpt_decay"])


def test_a_file_holds_no_noise_of_the_lstms_dropout() -> None:
    config = PromptEncoderConfig(
        task_type=TASK, num_virtual_tokens=5, encoder_reparameterization_type="LSTM",
        encoder_dropout=0.5,
    )  # fmt: skip
    model = get_peft_model(build("llama", TASK), config).train()
    first, second = (get_peft_model_state_dict(model)["prompt_embeddings"] for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())
    assert torch.equal(first, get_peft_model_state_dict(model.eval())["prompt_embeddings"])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("name", BEHIND)
def test_without_the_network_it_does_not_train(name: str, tmp_path: Path) -> None:
    model = attached(name).eval()
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(StateError, match="makes its rows by a network, and here are the rows") as e:
        set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    for remedy in ("is_trainable=False", "training_state-", "is_trainable=True, config=P"):
        assert remedy in str(e.value)
    peft = pytest.importorskip("peft")
    theirs = getattr(peft, CASES[name].kind)(task_type=TASK, **CASES[name].options)
    peft.get_peft_model(build("llama", TASK), theirs).save_pretrained(tmp_path / "theirs")
    base = build("llama", TASK)
    before = [n for n, _ in base.named_modules()]
    with pytest.raises(StateError, match="here are the rows alone"):
        PeftModel.from_pretrained(base, tmp_path / "theirs", is_trainable=True)
    assert [n for n, _ in base.named_modules()] == before
    with pytest.raises(StateError, match="here are the rows alone"):
        model.load_adapter(tmp_path / "theirs", "other", is_trainable=True)
    assert list(model.peft_config) == ["default"]
    kind = PrefixTuningConfig if name == "prefix" else PromptTuningConfig
    for folder in ("ours", "theirs"):  # the rows themselves
        plain = PeftModel.from_pretrained(
            build("llama", TASK), tmp_path / folder, is_trainable=True,
            config=kind(num_virtual_tokens=5, task_type=TASK),
        )  # fmt: skip
        losses = trained(plain, optimizer_of(plain), name, 3)
        assert losses[-1] < losses[0]
    for file in (tmp_path / "ours").glob("training_state-*"):
        file.unlink()
    with pytest.raises(FileError, match="is not there any more, so its training cannot be resumed"):
        PeftModel.from_pretrained(build("llama", TASK), tmp_path / "ours", is_trainable=True)
    PeftModel.from_pretrained(build("llama", TASK), tmp_path / "ours")


@pytest.mark.parametrize("going_on", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_values_of_a_checkpoint_come_back(name: str, going_on: bool, tmp_path: Path) -> None:
    """As a trainer does that goes on, or loads the best one in the end."""
    model = attached(name)
    optimizer = optimizer_of(model)
    trained(model, optimizer, name, 2)
    model.save_pretrained(tmp_path)
    values = {n: p.clone() for n, p in model.named_parameters()}
    trained(model, optimizer, name, 2)
    model.load_adapter(tmp_path, "default", is_trainable=going_on)
    for n, p in model.named_parameters():
        if n in values and p.requires_grad:
            torch.testing.assert_close(p, values[n], rtol=0, atol=0)


def test_another_network_is_refused(tmp_path: Path) -> None:
    attached("mlp").save_pretrained(tmp_path)
    config = PromptEncoderConfig(num_virtual_tokens=5, task_type=TASK)  # of another width
    with pytest.raises(FileError, match=r"training state in .* is that of another config"):
        PeftModel.from_pretrained(build("llama", TASK), tmp_path, is_trainable=True, config=config)


@pytest.mark.parametrize("name", BEHIND)
def test_what_answers_only_keeps_no_network(name: str, tmp_path: Path) -> None:
    model = attached(name).eval()
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(build("llama", TASK), tmp_path / "first")
    size = sum(p.numel() for p in loaded.parameters()) - sum(
        p.numel() for p in build("llama", TASK).parameters()
    )
    assert size == 5 * (32 if name != "prefix" else 2 * 2 * 16)
    loaded.save_pretrained(tmp_path / "second")
    assert not list((tmp_path / "second").glob("training_state-*"))
    given = batch(TASK)
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the trainer's own
def test_a_trainer_resumes_p_tuning(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[i % 2] for k, v in batch(TASK).items()} for i in range(12)]
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 3, "report_to": [],
        "learning_rate": 0.01, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip

    def trainer(model: Any, folder: str) -> Any:
        arguments = TrainingArguments(output_dir=str(tmp_path / folder), **options)
        return Trainer(model=model, args=arguments, train_dataset=rows)

    whole = attached("lstm")
    trainer(whole, "first").train()
    again = attached("lstm")
    with torch.no_grad():
        for p in again.parameters():
            if p.requires_grad:
                p.zero_()
    trainer(again, "second").train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
