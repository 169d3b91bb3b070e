"""Layer replication: blocks that run again, with adapters of their own and the base's tensors."""

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
    IA3Config,
    LoraConfig,
    PeftModel,
    StateError,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from graftwork.targets.replicas import Replicas
from graftwork.testing.bench import shake
from tiny import IDS, build

pytestmark = pytest.mark.filterwarnings("ignore")
FIVE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
RANGES = [[[0, 4], [2, 5]], [[2, 5], [0, 5]], [[0, 2], [3, 5]], [[1, 3], [1, 2], [0, 1]]]
GENERATE = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False,
            "pad_token_id": 0}  # fmt: skip


def llama(n: int = 5) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {**FIVE, "num_hidden_layers": n, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(**FIVE, num_attention_heads=4, num_labels=3)
    return BertForSequenceClassification(config).eval()


def gemma(n: int = 4) -> Any:
    """Blocks of two kinds, one after the other."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {**FIVE, "num_hidden_layers": n, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, sliding_window=3)).eval()


MODELS = {"llama": llama, "bert": bert, "gemma": gemma}
TARGETS = {"bert": ["query", "value"]}


def config(ranges: Any = RANGES[0], kind: str = "llama", **options: Any) -> LoraConfig:
    targets = TARGETS.get(kind, ["q_proj", "v_proj"])
    return LoraConfig(**{"r": 4, "target_modules": targets, "layer_replication": ranges, **options})


def replicated(ranges: Any = RANGES[0], kind: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(MODELS[kind](), config(ranges, kind, **options)).eval()
    shake(model, 0.3)
    return model


@torch.no_grad()
def answer(model: nn.Module, **call: Any) -> Tensor:
    return model(input_ids=IDS, **call).logits


def state(model: Any) -> dict[str, Any]:
    """Everything of a base model that must come back."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "modules": [(n, id(m)) for n, m in model.named_modules()],
        "training": {n: p.requires_grad for n, p in model.named_parameters()},
        "places": [m.layer_idx for m in model.modules() if "layer_idx" in vars(m)],
        "config": model.config.to_dict(),
    }


def same(model: Any, before: dict[str, Any]) -> None:
    now = state(model)
    assert now.keys() == before.keys()
    tensors = now.pop("tensors"), before.pop("tensors")
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0])
    assert now == before


# -- beside the real peft


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_files_cross_and_answers_agree_with_peft(ranges: Any, kind: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": TARGETS.get(kind, ["q_proj", "v_proj"])}
    ours = replicated(ranges, kind)
    ours.save_pretrained(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "ours").eval()
    torch.testing.assert_close(answer(read), answer(ours), rtol=1e-5, atol=1e-5)
    theirs = peft.LoraConfig(**options, layer_replication=ranges)
    theirs = peft.get_peft_model(MODELS[kind](), theirs).eval()
    shake(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    got = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "theirs")
    torch.testing.assert_close(answer(got), answer(theirs), rtol=1e-5, atol=1e-5)
    depth = sum(end - start for start, end in ranges)
    names = load_peft_weights(str(tmp_path / "theirs"))
    assert {int(n.split("layer")[1].split(".")[1]) for n in names} == set(range(depth))
    if kind == "llama":
        call = {"input_ids": IDS, **GENERATE}
        assert torch.equal(got.generate(**call), theirs.generate(**call))


# -- the laws


@pytest.mark.parametrize("kind", ["llama", "bert", "gemma"])
def test_repeated_blocks_share_every_tensor_of_the_base(kind: str) -> None:
    base = MODELS[kind]()
    tensors = {t.data_ptr() for t in [*base.parameters(), *base.buffers()]}
    ranges = [[0, 4], [2, 4]]
    model = get_peft_model(base, config(ranges, kind))
    new = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert {t.data_ptr() for t in [*model.parameters(), *model.buffers()]} - new == tensors
    parts = [p for h in model.base_model.hosts().values() for p in h.parts(("default",))]
    assert len({id(part.A) for part in parts}) == 2 * 6, "each block has factors of its own"


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_without_an_adapter_the_model_is_the_base(ranges: Any, kind: str) -> None:
    model, want = replicated(ranges, kind), answer(MODELS[kind]())
    adapted = answer(model)
    assert not torch.allclose(adapted, want, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(answer(model), want)
    model.base_model.disable_adapter_layers()
    assert torch.equal(answer(model), want)
    model.base_model.enable_adapter_layers()
    assert torch.equal(answer(model, adapter_names=["__base__"] * 2), want)
    assert torch.equal(answer(model), adapted)
    assert torch.equal(answer(copy.deepcopy(model)), adapted)
    assert torch.equal(answer(pickle.loads(pickle.dumps(model))), adapted)


@pytest.mark.parametrize("ranges", RANGES, ids=str)
def test_generation_with_a_cache(ranges: Any) -> None:
    model, base = replicated(ranges), llama()
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        call = {"input_ids": IDS, **GENERATE, **options}
        free = {k: v for k, v in call.items() if k != "cache_implementation"}
        assert torch.equal(model.generate(**call), model.generate(**free, use_cache=False))
        with model.disable_adapter():
            assert torch.equal(model.generate(**call), base.generate(**call))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("ranges", RANGES, ids=str)
@pytest.mark.parametrize("way", ["unload", "delete", "a failure"])
def test_the_base_comes_back_as_it_was(way: str, ranges: Any, kind: str) -> None:
    base = MODELS[kind]()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".4." in name or ".1." in name)
    before = state(base)
    if way == "a failure":
        with pytest.raises(TargetError, match="nope"):
            get_peft_model(base, config(ranges, target_modules=["nope"]))
        return same(base, before)
    model = get_peft_model(base, config(ranges, kind))
    shake(model)
    model.merge_adapter()
    model.unmerge_adapter()
    if way == "unload":
        assert model.unload() is base
    else:
        model.delete_adapter("default")
        before.pop("training"), before.update(training=state(base)["training"])  # not until unload
    same(base, before)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"layers_to_transform": [5, 6]},
                                     {"bias": "all"}, {"modules_to_save": ["input_layernorm"]},
                                     {"init_lora_weights": "pissa"}])  # fmt: skip
@pytest.mark.parametrize("ranges", [RANGES[0], RANGES[1]], ids=str)
def test_merging_gives_each_block_a_weight_of_its_own(
    ranges: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = replicated(ranges, **options)
    want, base = answer(model), answer(llama())
    model.merge_adapter()
    torch.testing.assert_close(answer(model), want, rtol=1e-5, atol=1e-5)
    assert model.config.tie_word_embeddings, "no end of the embedding has changed"
    with model.disable_adapter():
        assert torch.equal(answer(model), base)
    model.unmerge_adapter()
    assert torch.equal(answer(model), want)
    merged = model.merge_and_unload()
    torch.testing.assert_close(answer(merged), want, rtol=1e-5, atol=1e-5)
    assert type(merged.model.layers) is nn.ModuleList
    assert (
        merged.config.num_hidden_layers
        == len(merged.model.layers)
        == sum(end - start for start, end in ranges)
    )
    tensors = [p.data_ptr() for p in merged.parameters()]
    assert len(tensors) == len(set(tensors)) and all(p.requires_grad for p in merged.parameters())
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(answer(loaded), want, rtol=1e-5, atol=1e-5)


def test_unloading_without_an_active_adapter_gives_the_base() -> None:
    model = replicated()
    model.set_adapter([])
    assert torch.equal(answer(model.merge_and_unload()), answer(llama()))


def test_blocks_of_several_kinds() -> None:
    whole = replicated([[0, 4], [2, 4]], "gemma")
    want, base = answer(whole), gemma()
    call = {"input_ids": IDS, **GENERATE}
    assert torch.equal(whole.generate(**call), whole.generate(**call, use_cache=False))
    with whole.disable_adapter():
        assert torch.equal(answer(whole), answer(base))
        assert torch.equal(whole.generate(**call), base.generate(**call))
    merged = whole.merge_and_unload()
    torch.testing.assert_close(answer(merged), want, rtol=1e-5, atol=1e-5)
    assert merged.config.layer_types == ["sliding_attention", "full_attention"] * 3
    base, before = gemma(), state(gemma())
    with pytest.raises(TargetError, match="several kinds"):
        get_peft_model(base, config([[0, 3], [2, 4]]))
    before["modules"] = state(base)["modules"]
    same(base, before)


@pytest.mark.parametrize("kind", ["gpt2", "vit", "mixtral"])
def test_other_models_with_one_list_of_blocks(kind: str) -> None:
    from tiny import run

    options = {"target_modules": "all-linear", "layer_replication": [[0, 2], [1, 2]]}
    model = get_peft_model(build(kind), LoraConfig(r=2, **options)).eval()
    shake(model)
    want = run(model, kind)
    with model.disable_adapter():
        assert torch.equal(run(model, kind), run(build(kind), kind))
    torch.testing.assert_close(run(model.merge_and_unload(), kind), want, rtol=1e-4, atol=1e-5)


# -- what else a model does


def test_training_reaches_each_block_alone() -> None:
    model = replicated().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(want) == 7 * 2 * 2 and all(g.abs().sum() > 0 for g in want.values())
    twin = replicated().train()
    from tiny import enable_checkpointing

    enable_checkpointing(twin.get_base_model(), {"use_reentrant": False})
    twin(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, p in twin.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want.pop(name))
    assert not want


def test_compiled_and_in_threads() -> None:
    model, want, base = replicated(), answer(replicated()), answer(llama())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(answer(compiled), want)
        with model.disable_adapter():
            torch.testing.assert_close(answer(compiled), base)
    got: list[Tensor] = []
    with model.disable_adapter():
        thread = threading.Thread(target=lambda: got.append(answer(model)))
        thread.start()
        thread.join()
        assert torch.equal(answer(model), base) and torch.equal(got[0], want)


def test_hidden_states_are_those_that_ran() -> None:
    model, base = replicated(), llama()
    assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 8
    with model.disable_adapter(), torch.no_grad():
        got = model(input_ids=IDS, output_hidden_states=True).hidden_states
    want = base(input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_several_adapters_that_agree() -> None:
    model = replicated()
    model.add_adapter("b", config([[0, 4], [2, 3], [3, 5]], r=2))  # the same blocks
    model.set_requires_grad("b")
    shake(model)
    alone = answer(model)
    with model.using("b"):
        other = answer(model)
    mixed = answer(model, adapter_names=["default", "b"])
    torch.testing.assert_close(mixed[0], alone[0])
    torch.testing.assert_close(mixed[1], other[1])
    with pytest.raises(StateError, match="rows of '__base__' cannot be in a batch"):
        answer(model, adapter_names=["default", "__base__"])
    model.to_lora("default", "c")
    model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "d")
    with model.using("c"):
        torch.testing.assert_close(answer(model), alone, rtol=1e-4, atol=1e-5)
    assert model.peft_config["d"].layer_replication == RANGES[0]
    model.delete_adapter("default")
    assert len(model.get_base_model().model.layers) == 7


def test_starts_from_data_see_the_repeated_blocks() -> None:
    from graftwork import initialize_lora_eva_weights, preprocess_loraga

    model = get_peft_model(llama(), config(init_lora_weights="eva", eva_config={}))
    initialize_lora_eva_weights(model, [{"input_ids": IDS}])
    base, options = llama(), config(init_lora_weights="lora_ga")
    preprocess_loraga(base, options, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    model = get_peft_model(base, options).eval()
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(llama()))


def test_injected_without_a_wrapper(tmp_path: Path) -> None:
    model = replicated()
    model.save_pretrained(tmp_path)
    tensors = load_peft_weights(str(tmp_path))
    for given in (None, tensors):
        plain = inject_adapter_in_model(config(), llama(), state_dict=given)
        set_peft_model_state_dict(plain, tensors)
        assert torch.equal(answer(plain.eval()), answer(model))


# -- errors


@pytest.mark.parametrize(
    "ranges", [[[3, 3]], [[-1, 2]], [[0, 2, 3]], [["a", 2]], 3, "all", [[0.0, 2.0]], [2, 4]]
)
def test_ranges_that_are_none(ranges: Any) -> None:
    with pytest.raises(ValueError, match=r"layer_replication holds .* give pairs"):
        LoraConfig(layer_replication=ranges)


def test_models_that_cannot_be_repeated() -> None:
    options: Any = {"target_modules": "all-linear", "layer_replication": [[0, 2], [1, 2]]}
    with pytest.raises(TargetError, match=r"several, \['decoder.block', 'encoder.block'\]"):
        get_peft_model(build("t5"), LoraConfig(**options))
    with pytest.raises(TargetError, match="one list of blocks, and Plain has none"):
        get_peft_model(build("plain"), LoraConfig(**options))
    with pytest.raises(TargetError, match=r"block 8, and model.layers has the blocks 0 to 4"):
        get_peft_model(llama(), config([[0, 5], [6, 9]]))


def test_adapters_that_do_not_agree() -> None:
    model = replicated()
    others = [config(None), config([[0, 5]]), IA3Config()]
    for other in others:
        with pytest.raises(StateError, match="all adapters of a model run through the same"):
            model.add_adapter("b", other)
    assert isinstance(model.get_base_model().model.layers, Replicas)
    plain = get_peft_model(llama(), config(None))
    with pytest.raises(StateError, match=r"has layer_replication=None and the new one \[\[0, 4\]"):
        plain.add_adapter("b", config())
    assert len(plain.get_base_model().model.layers) == 5
