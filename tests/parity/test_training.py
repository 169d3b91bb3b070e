"""Training takes the same steps as the real peft from the same start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_crossing import peft, shake

import graftwork
import training
from tiny import IDS, build, run

pytestmark = pytest.mark.filterwarnings("ignore")

ADALORA = {
    "init_r": 4,
    "target_r": 2,
    "lora_alpha": 8,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 14,
    "orth_reg_weight": 0.3,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",  # peft forgets the penalty in a model without a task
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj"]}),
    "ia3": ("IA3Config", {}),
    "tokens": ("TrainableTokensConfig", {"token_indices": sorted(set(IDS.flatten().tolist()))}),
    "saved": ("LoraConfig", {"r": 4, "modules_to_save": ["lm_head"], "bias": "none"}),
    "adalora": ("AdaLoraConfig", ADALORA),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_same(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    theirs = peft.get_peft_model(build("llama"), getattr(peft, kind)(**options)).train()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = graftwork.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).train()
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05)
        for m in (theirs, ours)
    ]
    for step in range(1, 15):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        if case == "adalora":
            theirs.base_model.update_and_allocate(step)
            found = ours.peft_config["default"].rank_pattern
            kept = theirs.peft_config["default"].rank_pattern
            if kept is not None:
                kept = {k.removesuffix(".default"): v for k, v in kept.items()}
            assert found == kept, step
        assert losses[1] == pytest.approx(losses[0], abs=1e-5), step
    torch.testing.assert_close(run(ours.eval(), "llama"), run(theirs.eval(), "llama"))
    if case == "adalora":
        assert sum(map(sum, ours.peft_config["default"].rank_pattern.values())) == 12
        assert ours.adapters()[0].rank is not None


def test_a_pruned_adalora_crosses_both_ways(tmp_path: Path) -> None:
    ours = graftwork.get_peft_model(build("llama"), graftwork.AdaLoraConfig(**ADALORA)).train()
    shake(ours)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.05)
    for _ in range(14):
        optimizer.zero_grad()
        ours(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    want = run(ours.eval(), "llama")
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(run(theirs, "llama"), want, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = graftwork.PeftModel.from_pretrained(build("llama"), tmp_path / "theirs")
    torch.testing.assert_close(run(again, "llama"), want, rtol=1e-5, atol=1e-5)
    loaded = graftwork.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    torch.testing.assert_close(run(loaded, "llama"), want, rtol=1e-5, atol=1e-5)
    ranks = {row.rank for row in loaded.adapters()}
    assert len(ranks) > 1


TASK = training.cases()


@pytest.mark.slow
@pytest.mark.skipif(not training.MODEL.is_dir(), reason="the model and the texts are in ../shared")
@pytest.mark.parametrize("name", TASK)
def test_a_real_model_learns_real_texts_as_in_peft(name: str) -> None:
    result = training.compare(TASK[name])
    assert result.losses == pytest.approx(result.theirs, abs=1e-4)
    assert result.falls, "nothing is learnt"
