"""Gradient checkpointing of either kind changes no gradient, whoever switches it on and when, and
whatever the model is given.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import graftwork as g
from graftwork import LoraConfig, get_peft_model
from graftwork.testing.bench import shake
from tiny import IDS, PIXELS, build, enable_checkpointing

METHODS: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda t: LoraConfig(r=2, target_modules=t),
    "dora": lambda t: LoraConfig(r=2, use_dora=True, target_modules=t),
    "ia3": lambda t: g.IA3Config(target_modules=t, feedforward_modules=[]),
    "oft": lambda t: g.OFTConfig(r=0, oft_block_size=4, target_modules=t),
    "vera": lambda t: g.VeraConfig(r=4, target_modules=t),
    "loha": lambda t: g.LoHaConfig(r=2, target_modules=t),
}
GIVEN = ["text", "embeddings", "pictures"]


def batch(given: str) -> dict[str, Tensor]:
    if given == "pictures":
        return {"pixel_values": PIXELS, "labels": torch.tensor([0, 2])}
    if given == "text":
        return {"input_ids": IDS, "labels": IDS}
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return {"inputs_embeds": x, "labels": IDS}


def adapted(method: str, given: str, before: Callable[[Any], None] | None = None) -> Any:
    base: Any = build("vit" if given == "pictures" else "llama")
    if before is not None:
        before(base)
    names = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n in ("q_proj", "v_proj", "query", "value") if n in names]
    model = get_peft_model(base, METHODS[method](targets)).train()
    shake(model)
    return model


def gradients(model: Any, given: str) -> dict[str, Tensor]:
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's "None of the inputs have requires_grad=True"
        model(**batch(given)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@functools.cache
def wanted(method: str, given: str) -> dict[str, Tensor]:
    return gradients(adapted(method, given), given)


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and want
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    ("method", "when"),
    [(method, when) for method in METHODS for when in ("before", "after")]
    + [("lora", "on the base"), ("lora", "after a step")],
)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("given", GIVEN)
def test_gradients_are_those_without_it(
    method: str, given: str, reentrant: bool, when: str
) -> None:
    def enable(model: Any) -> None:
        enable_checkpointing(model, {"use_reentrant": reentrant})

    model = adapted(method, given, enable if when == "before" else None)
    if when == "after a step":
        gradients(model, given)
    if when in ("after", "after a step"):
        enable(model)
    if when == "on the base":
        enable(model.get_base_model())
    same(gradients(model, given), wanted(method, given))
    same(gradients(model, given), wanted(method, given))  # watched no longer


@pytest.mark.fault("C1")
@pytest.mark.parametrize("given", GIVEN)
def test_no_hook_on_the_embeddings_is_needed(given: str) -> None:
    model = adapted("lora", given)
    enable_checkpointing(model, {"use_reentrant": True})
    if given != "pictures":
        model.get_base_model().disable_input_require_grads()
    same(gradients(model, given), wanted("lora", given))


class Net(nn.Module):
    """Checkpoints by itself, in ways of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(9, 4)
        self.lin, self.top = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def block(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.lin(x) * scale

    def forward(self, ids: Tensor) -> Tensor:
        if self.how == "ids":
            return self.top(checkpoint(self.looked_up, ids, use_reentrant=True))
        x = self.table(ids)
        again: Any = functools.partial(checkpoint, use_reentrant=True)
        if self.how == "module":
            x = again(self.lin, x)
        elif self.how == "method":
            x = again(self.block, x)
        elif self.how == "partial":
            x = again(functools.partial(self.block, scale=1.0), x)
        elif self.how == "closure":
            x = again(lambda x: self.lin(x), x)
        else:
            x = self.lin(x)
        if self.how == "sequence":
            return checkpoint_sequential(self.top, 2, x.detach(), use_reentrant=True)
        return self.top(x)

    def looked_up(self, ids: Tensor) -> Tensor:
        return self.lin(self.table(ids))


@pytest.mark.fault("C1")
@pytest.mark.parametrize("how", ["module", "method", "partial", "closure", "ids", "sequence"])
def test_models_that_checkpoint_by_themselves(how: str) -> None:
    ids = torch.tensor([[1, 2, 3]])

    def run(how: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        names = ["top.0", "top.1"] if "seq" in (how, *asked) else ["lin", "top.0", "top.1"]
        model = get_peft_model(Net(how), LoraConfig(r=2, target_modules=names)).train()
        shake(model)
        model(ids).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    asked = ["seq"] if how == "sequence" else []
    same(run(how), run("plain"))


def test_without_adapters_that_train_it_is_torchs_own() -> None:
    model = get_peft_model(Net("module"), LoraConfig(r=2, target_modules=["lin"])).train()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.warns(UserWarning, match="None of the inputs"), model.disable_adapter():
        assert not model(ids).requires_grad
    model.set_requires_grad("default", False)
    with pytest.warns(UserWarning, match="None of the inputs"):
        assert not model(ids).requires_grad
    with torch.no_grad(), pytest.warns(UserWarning, match="None of the inputs"):
        model(ids)
    plain = Net("module")
    plain.table.requires_grad_(False)
    with pytest.warns(UserWarning, match="None of the inputs"):
        plain(ids)


@pytest.mark.fault("C1")
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainer_switches_it_on(reentrant: bool, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def trained(**options: Any) -> dict[str, Tensor]:
        model = adapted("lora", "embeddings")
        row = {k: v[0] for k, v in batch("embeddings").items()}
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2,
            remove_unused_columns=False, **options,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=[row] * 2).train()
        assert model.base_model.switch.proven
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    same(trained(**{name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}), trained())
