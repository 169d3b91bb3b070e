"""Names that cannot be: refused at once, in words, with the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nasty import Named
from torch import nn

from graftwork import (
    FileError,
    LoraConfig,
    PeftModel,
    StateError,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
)
from graftwork.testing.bench import shake
from graftwork.testing.entry import IDS
from graftwork.testing.layers import Experts

PLAIN = (("model",), ("embed", "layers", "head"), ("up", "down", "norm"))
CONFIG = LoraConfig(r=2, target_modules=["up"])
FALSE = [
    *("", "a.b", ".", "..", "../up", "__base__", "training", "_modules", "_parameters"),
    *("/etc", "a/", "a//b", " ", "a/ /b", "a\x00b", "a\nb", "\x7f", "\udc80", "x" * 256, "é" * 128),
    None, 3,
]  # fmt: skip


def model(names: tuple[Any, ...] = PLAIN) -> Any:
    torch.manual_seed(0)
    return Named(*names).eval()


@pytest.mark.fault("A3")
@pytest.mark.parametrize("name", FALSE, ids=ascii)
def test_an_adapter_cannot_be_called_so(name: Any, tmp_path: Path) -> None:
    plain, adapted = model(), get_peft_model(model(), CONFIG, "one")
    before, flags = list(plain.state_dict()), [p.requires_grad for p in plain.parameters()]
    adapted.save_pretrained(tmp_path)
    there = list(adapted.state_dict())
    for attach in (
        lambda: get_peft_model(plain, CONFIG, name),
        lambda: inject_adapter_in_model(CONFIG, plain, name),
        lambda: PeftModel.from_pretrained(plain, tmp_path / "one", name),
        lambda: adapted.add_adapter(name, CONFIG),
        lambda: adapted.load_adapter(tmp_path / "one", name),
        lambda: adapted.base_model.rename_adapter("one", name),
        lambda: adapted.add_weighted_adapter(["one"], [1.0], name),
    ):
        with pytest.raises(StateError, match="cannot be an adapter's name"):
            attach()
    assert list(plain.state_dict()) == before and list(adapted.state_dict()) == there
    assert [p.requires_grad for p in plain.parameters()] == flags
    assert list(adapted.peft_config) == ["one"]


@pytest.mark.fault("A3")
def test_adapters_of_one_folder_are_not_written_over_each_other(tmp_path: Path) -> None:
    adapted = get_peft_model(model(), CONFIG, "Name")
    adapted.add_adapter("name", CONFIG)
    (tmp_path / "Name").mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "Name")  # as a file system without cases has it
    with pytest.raises(FileError, match=r"'Name' and 'name' are one folder in .*rename_adapter"):
        adapted.save_pretrained(tmp_path)
    assert not list((tmp_path / "Name").iterdir())
    adapted.save_pretrained(tmp_path / "other")
    assert {p.name for p in (tmp_path / "other").iterdir() if p.is_dir()} >= {"Name", "name"}


@pytest.mark.fault("A3")
def test_a_child_that_is_called_as_a_tensor_of_its_parent(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.experts = Experts(False)
            self.experts.add_module(name, nn.Linear(8, 8))

        def forward(self, x: Any) -> Any:
            return self.experts(x)

    config = LoraConfig(
        r=2, target_parameters=["experts.up"], target_modules=[], modules_to_save=["lora_A"]
    )
    holder = Holder("lora_A")
    before = list(holder.state_dict())
    with pytest.raises(TargetError, match=r"would both be called experts\.lora_A\.weight in a f"):
        get_peft_model(holder, config)
    assert list(holder.state_dict()) == before
    config = LoraConfig(
        r=2, target_parameters=["experts.up", "experts.down"], target_modules=["base_layer"]
    )
    with pytest.raises(TargetError, match="in a file; rename that module, or adapt one of the two"):
        get_peft_model(Holder("base_layer"), config)


@pytest.mark.fault("A4")
def test_tokens_at_a_module_without_rows() -> None:
    names = (("model",), ("embed", "layers", "head"), ("up", "down", "norm"))
    plain = model(names)
    config = LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"norm": [1]})
    with pytest.raises(TargetError, match=r"names .*norm, a LayerNorm, which has no rows of tok"):
        get_peft_model(plain, config)
    same = model((("model",), ("embed", "layers", "head"), ("up", "down", "embed")))
    config = LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed": [1]})
    adapted = get_peft_model(same, config)  # the norms of that name have no rows, so are not meant
    shake(adapted)
    assert {r.site for r in adapted.adapters() if "embed" in r.site} == {"model.embed"}


def test_a_model_with_any_config_object_is_saved(tmp_path: Path) -> None:
    adapted = get_peft_model(model(), CONFIG)
    adapted.get_base_model().config.thing = object()
    adapted.save_pretrained(tmp_path)
    fresh = model()
    fresh.config.thing = object()
    loaded = PeftModel.from_pretrained(fresh, tmp_path)  # an address says nothing about a model
    with torch.no_grad():
        assert torch.equal(loaded(IDS), adapted(IDS))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
