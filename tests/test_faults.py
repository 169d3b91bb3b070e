"""What users of such libraries have met and no other test shows: see docs/faults.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import (
    AutoPeftModelForCausalLM,
    FileError,
    IA3Config,
    LoraConfig,
    MergeError,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    register_site,
)
from graftwork.engine.dense import DENSE
from graftwork.engine.site import KINDS
from graftwork.files.folder import WEIGHTS
from graftwork.interop.shims import prepare_model_for_kbit_training
from graftwork.testing.bench import shake
from tiny import IDS, build, run

# -- new tokens


@pytest.mark.fault("A4")
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_new_tokens_cost_their_rows_and_need_no_resizing(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "base")
    base = type(build(kind)).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(67, mean_resizing=False)
    new, tied = [64, 65, 66], kind == "llama_tied"
    tables = {"embed_tokens": new} if tied else {"embed_tokens": new, "lm_head": new}
    config = LoraConfig(r=2, task_type="CAUSAL_LM", trainable_token_indices=tables)
    model = get_peft_model(base, config)
    ids = torch.tensor([[1, 64, 65, 66, 5]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert os.path.getsize(tmp_path / "adapter" / WEIGHTS) < 6000  # tables: 8 KiB each
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(FileError, match=r"resize it first: model.resize_token_embeddings\(67\)"):
        PeftModel.from_pretrained(build(kind), tmp_path / "adapter")


@pytest.mark.fault("A4")
def test_rows_that_no_adapter_holds_are_saved_with_their_tables(tmp_path: Path) -> None:
    """The output layer has new rows too, and nothing else would remember them."""
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(66, mean_resizing=False)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", trainable_token_indices=[64, 65])
    model = get_peft_model(base, config).eval()
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(run(again, "llama"), run(model, "llama"))


# -- precision and memory


@pytest.mark.fault("C8")
def test_preparing_a_quantised_model_casts_nothing() -> None:
    model: Any = build("llama").to(torch.bfloat16)
    before = {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters()}
    prepared: Any = prepare_model_for_kbit_training(model)
    assert {n: (p.dtype, p.data_ptr()) for n, p in prepared.named_parameters()} == before
    adapted = get_peft_model(prepared, LoraConfig(r=2)).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


class Packed(nn.Parameter):
    """Eight bits a number, with one scale."""


class Linear8(nn.Module):
    """A quantised layer as the libraries have them: its own forward, a packed weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().max() / 127
        packed = (layer.weight.detach() / scale).round().to(torch.int8)
        self.weight, self.scale = Packed(packed, requires_grad=False), nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.fault("D1")
@pytest.mark.fault("D7")
def test_a_packed_weight_is_merged_by_what_it_stands_for_or_not_at_all() -> None:
    layer = Linear8(nn.Linear(8, 6))
    register_site(Linear8)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"])).eval()
    shake(model)
    x = torch.randn(3, 8)
    want, packed = model(x), layer.weight.clone()
    with pytest.raises(TypeError, match=r"packed weight \(Packed.*register a reader"):
        model.merge_adapter()
    assert torch.equal(layer.weight, packed) and torch.equal(model(x), want)
    DENSE["Packed"] = lambda w: w.float() * layer.scale
    try:
        with pytest.raises(MergeError, match=r"0.weight is packed .*would lose the update"):
            model.merge_adapter()
        assert torch.equal(layer.weight, packed) and torch.equal(model(x), want)
    finally:
        del DENSE["Packed"], KINDS[Linear8]


# -- reference models and servers


@pytest.mark.fault("C11")
def test_a_reference_is_what_training_began_from(tmp_path: Path) -> None:
    first = get_peft_model(build("llama"), LoraConfig(r=4))
    shake(first)
    first.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "reference")
    model.eval()
    with model.using("reference"):
        reference = model(input_ids=IDS).logits.log_softmax(-1)
    policy = model(input_ids=IDS).logits.log_softmax(-1)
    assert torch.equal(reference, policy)  # so their divergence is zero, and not that of the base
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=IDS).logits.log_softmax(-1), policy)
    policy.square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".default." in n for n in trained)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= p.grad
    with model.using("reference"):
        assert torch.equal(model(input_ids=IDS).logits.log_softmax(-1), reference)


@pytest.mark.fault("C12")
def test_tensors_for_a_server_are_the_adapters_and_the_base_is_not_written() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))
    shake(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    bits, versions = [p.clone() for p in frozen], [p._version for p in frozen]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sent = get_peft_model_state_dict(model)
        places = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        assert {t.data_ptr() for t in sent.values()} == places  # no copy
    assert [p._version for p in frozen] == versions
    assert all(torch.equal(p, b) for p, b in zip(frozen, bits, strict=True))


# -- combining


@pytest.mark.fault("E3")
@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_a_combined_adapter_keeps_its_ranks_and_scales(how: str, tmp_path: Path) -> None:
    configs = [
        LoraConfig(r=4, target_modules="all-linear", rank_pattern={"q_proj": 3, "down_proj": 2}),
        LoraConfig(r=4, target_modules="all-linear", use_rslora=True, lora_alpha=5),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 9}),
    ]
    model = get_peft_model(build("llama"), configs[0], "x").eval()
    for name, config in zip("yz", configs[1:], strict=True):
        model.add_adapter(name, config)
    for name in "xyz":
        model.set_adapter(name)
        shake(model, seed=ord(name))
    options = {"density": 0.5} if how in ("ties", "magnitude_prune") else {}
    model.add_weighted_adapter(list("xyz"), [0.7, 0.5, -0.3], "new", how, **options)
    model.set_adapter("new")
    want = run(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "new").eval()
    assert torch.equal(run(again, "llama"), want)


# -- offloaded layers


@pytest.mark.fault("F10")
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    "config",
    [
        lambda: LoraConfig(r=4, target_modules="all-linear"),
        lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
        IA3Config,
        lambda: OFTConfig(oft_block_size=4),
        lambda: VeraConfig(r=4, target_modules=["q_proj"]),
        lambda: LoraConfig(r=4, modules_to_save=["lm_head"]),
    ],
    ids=["lora", "dora", "ia3", "oft", "vera", "saved"],
)
def test_offloaded_layers_are_read_where_their_hooks_bring_them(
    config: Any, where: str, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = get_peft_model(build("llama"), config()).eval()
    shake(model)
    want = run(model, "llama")
    model.save_pretrained(tmp_path / "adapter")

    def offload(module: nn.Module) -> None:
        if where == "memory":
            accelerate.cpu_offload(module, execution_device="cpu")
        else:
            folder = tmp_path / f"off{len(list(tmp_path.iterdir()))}"
            accelerate.disk_offload(module, str(folder), execution_device="cpu")

    base = build("llama")
    offload(base)
    first = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(run(first, "llama"), want)
    with pytest.raises(MergeError, match=r"is offloaded, and what is written there.*graft merge"):
        first.merge_adapter()
    assert torch.equal(run(first, "llama"), want)
    other = build("llama")
    offload(other)
    new = get_peft_model(other, config())  # whose start may need the weight
    assert not any(p.is_meta for p in new.parameters() if p.requires_grad)
    offload(model)  # adapters and all, as a pipeline does that is offloaded when it is ready
    assert torch.equal(run(model, "llama"), want)
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
