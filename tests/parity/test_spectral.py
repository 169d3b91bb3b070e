"""What AdaMSS and FRoD do beside the answers: its schedule, and a basis found elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import graftwork
from graftwork.testing.bench import shake
from tiny import IDS, build

peft = pytest.importorskip("peft", reason="the real peft is the oracle of these tests")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_adamss_stops_the_clusters_that_peft_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.adamss.model import AdamssModel

    one_less = AdamssModel._global_mask_to_target  # PEFT keeps one less than it is asked to
    monkeypatch.setattr(
        AdamssModel, "_global_mask_to_target", lambda self, n, *rest: one_less(self, n + 1, *rest)
    )
    config = peft.AdamssConfig(
        r=10, num_subspaces=4, subspace_rank=2, use_asa=True, asa_target_subspaces=6,
        init_warmup=2, final_warmup=12, mask_interval=3, target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    theirs: Any = peft.get_peft_model(build("llama"), config)
    shake(theirs, 0.05)
    theirs.save_pretrained(tmp_path)
    ours: Any = graftwork.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    pair = (theirs.train(), ours.train())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in pair]
    counts = []
    for step in range(14):
        losses = []
        for model, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if model is theirs:
                theirs.base_model.update_and_allocate(step)
        counts.append([sum(p.requires_grad for p in m.parameters()) // 2 for m in pair])
        assert losses[1] == pytest.approx(losses[0], abs=1e-4), step
        assert counts[-1][0] == counts[-1][1], step
    assert counts[0][1] == 16 and counts[-1][1] == 6


def test_frod_reads_a_basis_that_was_found_elsewhere(tmp_path: Path) -> None:
    config = graftwork.FrodConfig(target_modules=["q_proj", "down_proj"], sparse_rate=0.1)
    model: Any = graftwork.get_peft_model(build("llama"), config)
    shake(model, 0.05)
    model.eval().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name, part in (("self_attn_q_proj", "q_proj"), ("mlp_down_proj", "down_proj")):
        v, (i, j) = (tensors[f"base_model.frod_{key}.{name}"] for key in ("V", "s_indices"))
        sign = torch.ones(len(v))
        sign[::2] = -1  # as another LAPACK might: V P, U P, and so P S P
        v *= sign
        for key in tensors:
            if key.endswith(f"{part}.frod_lambda_s_values"):
                tensors[key] *= sign[i] * sign[j]
    save_file(tensors, file, metadata=metadata)
    loaded: Any = graftwork.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    with torch.no_grad():
        answers = [m(input_ids=IDS).logits for m in (loaded, model)]
    torch.testing.assert_close(*answers)
