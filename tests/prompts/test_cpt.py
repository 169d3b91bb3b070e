"""Context-aware prompt tuning: its ball, its loss, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graftwork import AdaLoraConfig, CPTConfig, PeftModel, PromptTuningConfig, StateError
from graftwork import get_peft_model as attach
from graftwork.testing.bench import shake

from .rows import EXAMPLES, batch, build

TASK = "CAUSAL_LM"
DECAY = {**EXAMPLES, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}


def model_of(family: str = "llama", **options: Any) -> Any:
    return attach(build(family, TASK), CPTConfig(task_type=TASK, **(options or EXAMPLES)))


def test_rows_stay_in_their_ball_and_labels_where_they_are() -> None:
    model = model_of()
    part = model.base_model.switch.shared["default"]
    table = model.get_base_model().get_input_embeddings().weight
    assert torch.equal(part.E, table[EXAMPLES["cpt_token_ids"]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1000.0)
    model(**batch(TASK)).loss.backward()
    optimizer.step()
    assert model.base_model.switch.schedules["default"].step == 1
    far = (part.whole() - table[EXAMPLES["cpt_token_ids"]]).norm(dim=1)
    form, input_ = 0.1 * (32 / 2048) ** 0.5, 3.0 * (32 / 2048) ** 0.5
    want = torch.tensor([form, input_, form, 0.0] * 2)
    torch.testing.assert_close(far, want, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_loss_is_the_weighted_mean_over_both_kinds_of_labels() -> None:
    model = model_of(**DECAY).eval()
    given, mask = batch(TASK, padded=False), torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0  # the virtual tokens stand behind this padding
    given |= {"attention_mask": mask, "labels": given["labels"].masked_fill(mask == 0, -100)}
    out = model(**given)
    terms, ids = [], torch.tensor(EXAMPLES["cpt_token_ids"])
    for logits, labels, pads in zip(out.logits, given["labels"], (0, 2), strict=True):
        row = torch.cat([labels[:pads], ids, labels[pads:]])
        weight = torch.ones(15)
        weight[pads : pads + 8] = torch.tensor([0, 0, 0, 0.25, 0, 0, 0, 0.5])
        weight[:pads] = 0
        loss = F.cross_entropy(logits[:-1], row[1:], reduction="none", ignore_index=-100)
        terms += [w * one for w, one in zip(weight[1:], loss, strict=True) if w > 0]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    pair = model(**given, return_dict=False)
    torch.testing.assert_close(pair[0], out.loss)
    assert torch.equal(pair[1], out.logits)
    half = model(**given, num_items_in_batch=24).loss  # 12 labels here, 12 in another batch
    torch.testing.assert_close(half, out.loss / 2)


def test_what_is_given_stays_as_it_is() -> None:
    types = torch.tensor([[1, 2, 2, 3, 4, 4, 4]] * 2)
    given = {**batch(TASK), "input_type_mask": types}
    before = {k: v.clone() for k, v in given.items()}
    model_of(**DECAY)(**given)
    assert all(torch.equal(given[k], before[k]) for k in given)


@torch.no_grad()
def test_input_types_hide_labels() -> None:
    model, given = model_of(), batch(TASK, padded=False)
    types = torch.tensor([[1, 2, 2, 3, 4, 4, 4]] * 2)
    fewer = {**given, "labels": given["labels"].masked_fill(types < 4, -100)}
    torch.testing.assert_close(model(**given, input_type_mask=types).loss, model(**fewer).loss)


def test_beside_other_adapters_each_keeps_its_part_of_the_loss() -> None:
    model, given = model_of().train(), batch(TASK)
    alone = model(**given).loss
    model.add_adapter("ranks", AdaLoraConfig(init_r=2, target_r=1, total_step=10))
    model.base_model.set_adapter(["default", "ranks"])
    penalty = model.base_model.switch.schedules["ranks"].penalty()
    torch.testing.assert_close(model(**given).loss, alone + penalty)
    model.delete_adapter("ranks")
    model.add_adapter("more", PromptTuningConfig(task_type=TASK, num_virtual_tokens=3))
    for names in (["more", "default"], ["default", "more"]):
        model.base_model.set_adapter(names)
        assert model(**given).logits.shape[1] == 7 + 8 + 3
        assert model(**given).loss.isfinite()


@torch.no_grad()
def test_a_mixed_batch_has_one_loss() -> None:
    model, given = model_of(), batch(TASK)
    labels = given.pop("labels")
    model(**given, adapter_names=["default", "__base__"])
    with pytest.raises(
        StateError, match=r"'default' weighs the tokens of the loss, .* leave labels"
    ):
        model(**given, labels=labels, adapter_names=["default", "__base__"])


def test_it_trains_on_from_rows_of_the_same_model_alone(tmp_path: Path) -> None:
    model = model_of()
    part = model.base_model.switch.shared["default"]
    with torch.no_grad():
        shake(model)
        part.project()
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("training_state-*"):  # as PEFT would have saved it
        (tmp_path / "README.md").touch()
        file.unlink()
    from safetensors.torch import load_file, save_file

    save_file(
        load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors"
    )
    again: Any = PeftModel.from_pretrained(build("llama", TASK), tmp_path, is_trainable=True)
    mine = again.base_model.switch.shared["default"]
    torch.testing.assert_close(mine.D, part.D)
    assert torch.equal(mine.E, part.E)
    with pytest.raises(StateError, match="trained on another base model; load it with is_train"):
        PeftModel.from_pretrained(build("gpt2", TASK), tmp_path, is_trainable=True)
