"""Lily, whose layers share what they train and whose rows look at each other."""

from __future__ import annotations

from pathlib import Path

import torch

from graftwork import LilyConfig, LoraConfig, PeftModel, get_peft_model
from graftwork.testing.bench import shake
from tiny import IDS, build, run

TARGETS = ["q_proj", "v_proj"]


def test_an_adapters_rows_are_as_they_are_without_the_others() -> None:
    """The mean that mixes the experts is over the rows of one adapter, at every layer."""
    model = get_peft_model(build("llama"), LilyConfig(r=2, target_modules=TARGETS), "lily").eval()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.set_requires_grad(["lily", "lora"])
    shake(model, 0.3)
    ids = torch.cat([IDS, IDS.flip(0).roll(3, 1)])
    with torch.no_grad():
        rows = model(ids, adapter_names=["lora", "lily", "__base__", "lily"]).logits
        alone = model(ids[[1, 3]]).logits
        other = model(ids[[1, 2]]).logits
    torch.testing.assert_close(rows[[1, 3]], alone)
    assert not torch.allclose(other[:1], alone[:1]), "the mixture does not look at both rows"


def test_layers_with_values_of_their_own_share_with_their_like(tmp_path: Path) -> None:
    own = {"r": 3, "num_B": 4, "scaling": 0.5}
    config = LilyConfig(r=2, num_B=2, target_modules=TARGETS)
    config.overrides = {"1.self_attn.q_proj": own}
    model = get_peft_model(build("llama"), config).eval()
    torch.testing.assert_close(run(model, "llama"), run(build("llama"), "llama"))
    shared = model.base_model.switch.shared["default"]
    assert sorted(tuple(b.shape) for b in shared.B) == [(4, 16), (4, 32), (12, 32)]
    shake(model, 0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(loaded, "llama"), run(model, "llama"))
