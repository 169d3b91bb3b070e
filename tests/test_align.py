"""Files of a model whose layers have other names in front: loaded where just one reading fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftwork as g
from graftwork import FileError, LoraConfig, PeftModel, PeftWarning, get_peft_model
from graftwork.files import align
from graftwork.testing.bench import shake
from tiny import build


class Wrapped(nn.Module):
    """A model within another one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, build("llama"))

    def forward(self, **inputs: Any) -> Any:
        return getattr(self, self.name)(**inputs)


IDS = torch.arange(8).view(2, 4)
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "dora, head": lambda: LoraConfig(
        r=2, use_dora=True, target_modules="all-linear", modules_to_save=["lm_head"]
    ),
    "vera": lambda: g.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "loha": lambda: g.LoHaConfig(r=2, target_modules=["v_proj"]),
    "ia3": lambda: g.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.fault("A2")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrapper_more_less_or_other(name: str, tmp_path: Path) -> None:
    makers = {
        "": lambda: build("llama"),
        "language_model.": lambda: Wrapped("language_model"),
        "text.": lambda: Wrapped("text"),
    }
    for here, saved in makers.items():
        model = get_peft_model(saved(), CONFIGS[name]()).eval()
        shake(model, seed=2)
        folder = tmp_path / (here or "plain")
        model.save_pretrained(folder)
        for there, new in makers.items():
            if there == here:
                continue
            text = f"{here or 'no front'!r} there is {there or 'no front'!r} here"
            with pytest.warns(PeftWarning) as told:
                loaded = PeftModel.from_pretrained(new(), folder)
            assert any(text in str(one.message) for one in told), [str(t.message) for t in told]
            assert torch.equal(logits(loaded), logits(model))
            fresh = get_peft_model(new(), CONFIGS[name]())
            with pytest.warns(PeftWarning):
                report = fresh.load_adapter(folder, "again")
            assert report.ok and len(report.renamed) >= len(report.matched) - 2


@pytest.mark.fault("A2")
def test_two_readings_or_none_are_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.Linear(6, 6), "c": nn.Linear(6, 6)})

    config = LoraConfig(r=2, target_modules=["a", "b", "c"], allow_unmatched=True)
    with pytest.warns(PeftWarning):
        model = get_peft_model(Two(), config)
    model.save_pretrained(tmp_path)
    with pytest.warns(PeftWarning), pytest.raises(FileError, match=r"does not fit .*\n"):
        PeftModel.from_pretrained(Deep(), tmp_path)


def test_the_readings() -> None:
    def moved(file: Any, model: Any) -> Any:
        return align.moved(file, model, dict.fromkeys(model, "A"))

    here = {"m.layers.0.q.A": (2, 4), "m.layers.1.q.A": (2, 4)}
    bare = {"layers.0.q.A": (2, 4), "layers.1.q.A": (2, 4)}
    assert moved(bare, here) == ("", "m.") and moved(here, bare) == ("m.", "")
    assert moved({f"0.auto.{k}": v for k, v in bare.items()}, bare) == ("0.auto.", "")
    other = {name.replace("m.", "model.text."): shape for name, shape in here.items()}
    assert moved(here, other) == ("m.", "model.text.")
    one, two = {"m.layers.0.q.A": (2, 4)}, {"m.layers.1.q.A": (2, 4)}
    assert moved(one, two) is None  # another layer is no other name
    assert moved(bare, {name: (2, 5) for name in here}) is None
    assert moved(bare, one) is None and moved({}, {}) is None
    assert moved({"q.A": (1,)}, {"q.B": (1,)}) is None
    assert moved({"old.A": (1,)}, {"new.A": (1,)}) is None  # another name of the layer itself
    assert moved({"a.q.A": (1,)}, {"b.q.A": (1,)}) == ("a.", "b.")
    halves = {"x.q.A": (2, 4), "y.q.A": (2, 4)}
    assert moved({"q.A": (2, 4), "z.q.A": (2, 4)}, halves) is None
    assert align.mapping("m.", r"a\b.") == {r"^m\.": r"a\\b."}
