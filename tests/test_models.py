"""Whole models: ties, mixed batches, generation, checkpointing, compilation, threads."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    StateError,
    TrainableTokensConfig,
    get_peft_model,
)
from graftwork.testing.bench import shake
from tiny import IDS, build, enable_checkpointing, run

CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config,
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10),
    "embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens"]),
    "head": lambda: LoraConfig(r=4, target_modules=["lm_head"]),
    "both": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "shared": lambda: LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tokens": lambda: TrainableTokensConfig(token_indices=[5, 9]),
    "lora_tokens": lambda: LoraConfig(r=4, trainable_token_indices=[5, 9]),
    "saved": lambda: LoraConfig(r=4, modules_to_save=["lm_head"]),
    "saved_embedding": lambda: LoraConfig(r=4, modules_to_save=["embed_tokens"]),
    "saved_shared": lambda: LoraConfig(
        r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "bias": lambda: LoraConfig(r=4, bias="all", target_modules=["q_proj"]),
}


EMBEDDED = (
    "embedding head both shared tokens lora_tokens saved saved_embedding saved_shared"
).split()


def adapted(model: str, *configs: str) -> Any:
    wrapped = get_peft_model(build(model), CONFIGS[configs[0]](), "a0").eval()
    for i, name in enumerate(configs[1:], 1):
        wrapped.add_adapter(f"a{i}", CONFIGS[name]())
    wrapped.set_adapter([f"a{i}" for i in range(len(configs))])
    shake(wrapped)
    return wrapped


@pytest.mark.fault("A5")
@pytest.mark.parametrize("model", ["llama", "llama_tied", "gpt2", "t5"])
@pytest.mark.parametrize("config", EMBEDDED)
def test_embeddings_mean_the_same_adapted_merged_and_saved(
    model: str, config: str, tmp_path: Path
) -> None:
    options = CONFIGS[config]()
    names = {"gpt2": "wte", "t5": "shared"}
    for field in ("target_modules", "modules_to_save"):
        value = getattr(options, field)
        if value and model in names:
            renamed = {names[model] if v == "embed_tokens" else v for v in value}
            setattr(options, field, renamed if field == "target_modules" else list(renamed))
    base = build(model)
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    if not tied and options.ensure_weight_tying if hasattr(options, "ensure_weight_tying") else 0:
        with pytest.warns(UserWarning, match="no adapter sits at a tied weight"):
            wrapped = get_peft_model(base, options).eval()
    else:
        wrapped = get_peft_model(base, options).eval()
    shake(wrapped)
    want, was_tied = run(wrapped, model), base.config.tie_word_embeddings

    wrapped.merge_adapter()
    torch.testing.assert_close(run(wrapped, model), want, rtol=1e-4, atol=1e-5)
    wrapped.unmerge_adapter()
    assert torch.equal(run(wrapped, model), want) and base.config.tie_word_embeddings == was_tied
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    assert (inputs.weight is outputs.weight) == tied

    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(run(merged, model), want, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(loaded, model), want, rtol=1e-4, atol=1e-5)
    if config in ("shared", "tokens", "lora_tokens", "saved_shared") and model != "t5":
        assert (
            loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        ) == tied


@pytest.mark.fault("F4")
@pytest.mark.parametrize("config", ["lora", "dora", "ia3", "adalora", "tokens", "saved", "bias"])
@pytest.mark.parametrize("model", ["llama", "llama_tied"])
def test_a_mixed_batch_is_each_row_alone(model: str, config: str) -> None:
    wrapped = adapted(model, config, "lora")
    wrapped.set_adapter("a0")
    ids = torch.cat([IDS, IDS.flip(1)])
    rows = ["a1", "__base__", "a0", "a1"]
    with torch.no_grad():
        mixed = wrapped(input_ids=ids, adapter_names=rows).logits
        for i, name in enumerate(rows):
            with wrapped.using(*([] if name == "__base__" else [name])):
                alone = wrapped(input_ids=ids[i : i + 1]).logits[0]
            torch.testing.assert_close(mixed[i], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("config", ["lora", "ia3", "saved"])
def test_generation_with_a_name_per_row(config: str, beams: int) -> None:
    wrapped = adapted("llama", config, "dora")
    wrapped.set_adapter("a0")
    rows = ["a1", "__base__"]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    mixed = wrapped.generate(input_ids=IDS, adapter_names=rows, **options)
    assert not torch.equal(mixed, wrapped.generate(input_ids=IDS, **options))
    for i, name in enumerate(rows):
        with wrapped.using(*([] if name == "__base__" else [name])):
            alone = wrapped.generate(input_ids=IDS[i : i + 1], **options)[0]
        assert torch.equal(mixed[i, : len(alone)], alone)


@pytest.mark.fault("B3")
def test_experts_in_a_mixed_batch() -> None:
    wrapped = get_peft_model(
        build("mixtral"),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]),
        "a0",
    ).eval()
    wrapped.add_adapter("a1", LoraConfig(r=2, target_modules=["v_proj"]))
    wrapped.set_adapter(["a0", "a1"])
    shake(wrapped)
    rows = ["a0", "a1"]
    with torch.no_grad():
        mixed = wrapped(input_ids=IDS, adapter_names=rows).logits
        for i, name in enumerate(rows):
            with wrapped.using(name):
                alone = wrapped(input_ids=IDS[i : i + 1]).logits[0]
            torch.testing.assert_close(mixed[i], alone, rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.fault("C1")
@pytest.mark.parametrize("config", ["lora", "dora", "ia3", "adalora", "saved", "tokens"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_gradient_checkpointing_changes_no_gradient(
    config: str, reentrant: bool, before: bool
) -> None:
    plain = adapted("llama", config).train()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    want = gradients(plain)
    base = build("llama")
    options = {"use_reentrant": reentrant}
    if before:
        enable_checkpointing(base, options)
    wrapped: Any = get_peft_model(base, CONFIGS[config](), "a0").train()
    shake(wrapped)
    if not before:
        enable_checkpointing(wrapped, options)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    got = gradients(wrapped)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.fault("C1")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_repeated_with_the_names_of_its_own_call(reentrant: bool) -> None:
    def two_losses(checkpointing: bool) -> dict[str, Tensor]:
        wrapped = adapted("llama", "lora", "dora").train()
        wrapped.set_requires_grad(["a0", "a1"])
        if checkpointing:
            enable_checkpointing(wrapped, {"use_reentrant": reentrant})
        rows = ["a1", "a0"]
        first = wrapped(input_ids=IDS, labels=IDS, adapter_names=rows).loss
        with wrapped.using("a1"):
            second = wrapped(input_ids=IDS, labels=IDS).loss
        wrapped.base_model.switch.activate(())  # by now the model has another choice
        (first + 2 * second).backward()
        return gradients(wrapped)

    want, got = two_losses(False), two_losses(True)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.parametrize("config", ["lora", "dora", "ia3", "adalora", "tokens", "saved"])
def test_a_language_model_compiles_without_graph_breaks(config: str) -> None:
    wrapped = adapted("llama", config, "lora")
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    rows = ["a1", "a0"]
    with torch.no_grad():
        for names in (("a0",), ("a1",), ("a0", "a1"), ()):
            with wrapped.using(*names):
                want = wrapped(input_ids=IDS).logits
                torch.testing.assert_close(compiled(input_ids=IDS).logits, want)
        want = wrapped(input_ids=IDS, adapter_names=rows).logits
        torch.testing.assert_close(compiled(input_ids=IDS, adapter_names=rows).logits, want)


def test_compiled_training_gives_the_same_gradients() -> None:
    wrapped = adapted("llama", "adalora").train()
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    want = gradients(wrapped)
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    got = gradients(wrapped)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.fault("F6")
def test_switching_compiles_once_for_each_choice() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    wrapped = adapted("llama", "lora", "ia3")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wrapped, fullgraph=True, backend=counter)
    with torch.no_grad():
        for names in (("a0",), ("a1",), ("a0", "a1"), ("a0",), ("a1",), ("a0", "a1")):
            wrapped.set_adapter(names)
            compiled(input_ids=IDS)
    assert counter.frame_count == 3


def test_compiled_code_sees_the_first_choice_that_a_thread_makes() -> None:
    wrapped, got = adapted("llama", "lora"), []
    base = run(build("llama"), "llama")

    def work() -> None:  # in a thread in which no choice was ever made
        torch._dynamo.reset()
        compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
        got.append(run(compiled, "llama"))
        with wrapped.disable_adapter():
            got.append(run(compiled, "llama"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.testing.assert_close(got[0], run(wrapped, "llama"))
    torch.testing.assert_close(got[1], base)


@pytest.mark.fault("F8")
def test_threads_do_not_see_each_others_choice() -> None:
    wrapped = adapted("llama", "lora", "dora", "ia3", "adalora")
    names = ["a0", "a1", "a2", "a3"]
    with torch.no_grad():
        alone = {}
        for name in names:
            with wrapped.using(name):
                alone[name] = wrapped(input_ids=IDS).logits
    wrong: list[str] = []

    def work(name: str) -> None:
        with torch.no_grad(), wrapped.using(name):
            for _ in range(10):
                if not torch.equal(wrapped(input_ids=IDS).logits, alone[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.fault("A10")
def test_copies_of_whole_models() -> None:
    wrapped = adapted("llama_tied", "lora_tokens", "shared")
    want = run(wrapped, "llama_tied")
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(run(twin, "llama_tied"), want)
        twin.set_adapter("a0")
        assert wrapped.active_adapters == ["a0", "a1"]
        assert torch.equal(run(wrapped, "llama_tied"), want)
        inner = twin.get_base_model()
        assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight


@pytest.mark.fault("C5")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision_models(dtype: torch.dtype) -> None:
    for config in ("lora", "dora", "ia3", "adalora", "saved", "tokens"):
        wrapped = adapted("llama", config)
        with torch.no_grad():
            want = wrapped(input_ids=IDS).logits
            with torch.autocast("cpu", dtype=dtype):
                got = wrapped(input_ids=IDS).logits
        torch.testing.assert_close(got.float(), want, rtol=0.2, atol=0.2)
        low = adapted("llama", config).to(dtype)
        with torch.no_grad():
            assert low(input_ids=IDS).logits.dtype == dtype


@pytest.mark.fault("C5")
def test_a_model_trained_in_low_precision_keeps_its_adapter_in_full() -> None:
    base = build("llama").bfloat16()
    wrapped = get_peft_model(base, CONFIGS["lora"]())
    kinds = {p.dtype for p in wrapped.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    low = get_peft_model(build("llama").bfloat16(), CONFIGS["lora"](), autocast_adapter_dtype=False)
    assert {p.dtype for p in low.parameters() if p.requires_grad} == {torch.bfloat16}
    shake(low)
    want = run(low, "llama")
    low.merge_adapter()
    torch.testing.assert_close(run(low, "llama"), want, rtol=0.1, atol=0.1)


@pytest.mark.fault("B5")
def test_torch_encoder_layers_do_not_bypass_the_adapter() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["linear1", "linear2"])).eval()
    x = torch.randn(2, 3, 16)
    shake(wrapped)
    with torch.no_grad():
        got = wrapped(x)
        with wrapped.disable_adapter():
            assert not torch.allclose(got, wrapped(x))
    torch.testing.assert_close(got, wrapped(x).detach())


@pytest.mark.fault("B2")
@pytest.mark.fault("L3")
def test_the_unknown_architecture_is_adapted_by_its_structure() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    model = nn.Sequential(nn.Linear(4, 16), encoder, nn.Linear(16, 2)).eval()
    wrapped = get_peft_model(model, LoraConfig(r=2)).eval()
    sites = {row.site.rpartition(".")[2] for row in wrapped.adapters()}
    assert sites == {"in_proj_weight", "linear1", "linear2", "weight"}
    assert len(wrapped.base_model.hosts()) == 9
    shake(wrapped)
    x = torch.randn(2, 3, 4)
    y = wrapped(x)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(x), y, rtol=1e-4, atol=1e-5)


def test_modules_that_stand_at_two_places_are_adapted_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    model = Twice()
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["a"]))
    assert model.a is model.b and wrapped.base_model.hosts().keys() == {"a"}
    assert wrapped.unload().b is wrapped.unload().a


def test_an_adapter_that_another_would_hide_cannot_be_active_beside_it() -> None:
    wrapped = adapted("llama", "saved", "lora")
    wrapped.add_adapter("a2", CONFIGS["saved"]())
    with pytest.raises(
        StateError, match="'a2' puts its values in place of those of 'a0' at lm_head"
    ):
        wrapped.set_adapter(["a0", "a2"])
    wrapped.add_adapter("a3", CONFIGS["tokens"]())
    wrapped.add_adapter("a4", CONFIGS["tokens"]())
    with pytest.raises(StateError, match="'a4' puts its values in place of those of 'a3'"):
        wrapped.set_adapter(["a3", "a4"])
    assert wrapped.active_adapters == ["a0", "a1"]


def test_a_sequence_first_model_refuses_a_mixed_batch() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))
    wrapped: Any = PeftModel(model, LoraConfig(r=2, target_modules=["linear1"]))
    with pytest.raises(StateError, match="sequence first"):
        wrapped(torch.randn(4, 4, 16), adapter_names=["default"] * 4)
