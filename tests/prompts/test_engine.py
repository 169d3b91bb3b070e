"""Prompts where the engine or transformers do something special: one graph, caches of fixed size,
weights of integers, configs that a forward writes to.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from graftwork import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    StateError,
    get_peft_model,
)
from graftwork.prompts.generating import CACHE as PREPARE
from graftwork.prompts.generating import MASKS
from prompts.families import FAMILIES, inputs

from .rows import EXAMPLES, batch, build

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
THREE = {"num_virtual_tokens": 3}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (PromptTuningConfig, THREE),
    "mlp": (PromptEncoderConfig, THREE),
    "tasks": (MultitaskPromptTuningConfig, {**THREE, "num_tasks": 3}),
    "prefix": (PrefixTuningConfig, THREE),
    "deep": (PTuningV2Config, {**THREE, "prefix_projection": True}),
    "cartridge": (CartridgeConfig, THREE),
    "gate": (AdaptionPromptConfig, {"adapter_layers": 1}),
    "cpt": (CPTConfig, EXAMPLES),
}
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FIXED = {"cache_implementation": "static"}
OUTPUT = transformers.modeling_outputs.CausalLMOutputWithPast
CACHE = "cache" if "cache" in OUTPUT.__annotations__ else "past_key_values"  # the older name


def of(kind: str, task: str | None, **more: Any) -> Any:
    config, options = KINDS[kind]
    return config(task_type=task, **{**options, **more})


# -- one graph


def step(model: nn.Module, of: Any, x: dict[str, Any]) -> list[Tensor]:
    """The logits, and the gradients of all that trains."""
    model.zero_grad()
    y = of(**x)
    (y.loss if "loss" in y else y.start_logits.square().sum()).backward()
    logits = y.logits if "logits" in y else y.start_logits
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


COMPILED = [
    ("llama", "CAUSAL_LM", ("prompt", "tasks", "prefix", "gate")),
    ("bert", "SEQ_CLS", ("mlp", "deep")),
    ("bart", "SEQ_2_SEQ_LM", ("prompt",)),
]


@pytest.mark.parametrize(
    ("family", "task", "kind"), [(f, task, kind) for f, task, kinds in COMPILED for kind in kinds]
)
def test_one_graph_does_what_the_code_does(family: str, task: str, kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build(family, task), of(kind, task))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "gate" in name:
                parameter.fill_(0.5)
    x: dict[str, Any] = batch(task)
    if kind == "tasks":
        x["task_ids"] = torch.tensor([2, 0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected, found = step(model, model, x), step(model, compiled, x)
    assert len(expected) > 1
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@torch.no_grad()
def test_what_is_compiled_follows_every_change() -> None:
    """Other adapters, none, several, one for each row; other values; other sizes of the batch."""
    kind = "prompt"
    torch.manual_seed(0)
    model = get_peft_model(build("llama", "CAUSAL_LM"), of(kind, "CAUSAL_LM"), "a").eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, sizes = batch("CAUSAL_LM"), []

    def same(**options: Any) -> None:
        y = model(**x, **options).logits
        sizes.append(y.shape)
        torch.testing.assert_close(compiled(**x, **options).logits, y, **CLOSE)

    same()
    model.add_adapter("b", of(kind, "CAUSAL_LM", num_virtual_tokens=6))
    model.set_adapter("b")
    same()
    model.set_adapter(["a", "b"])
    same()
    with model.disable_adapter():
        same()
    for rows in (3, 5):
        x = {k: v[:1].expand(rows, -1).clone() for k, v in batch("CAUSAL_LM").items()}
        same()
    x = batch("CAUSAL_LM")
    same(adapter_names=["b", "a"])
    model.delete_adapter("b")
    model.set_adapter("a")
    same()
    model.base_model.switch.shared["a"].E.add_(1.0)
    same()
    assert len(set(sizes)) > 2


# -- caches of fixed size


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gemma4", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["prompt", "tasks"])
@torch.no_grad()
def test_a_cache_of_fixed_size_has_room_for_virtual_tokens(family: str, kind: str) -> None:
    """Those of a decoder: of an encoder-decoder multitask prompts have some, others have none."""
    f, ids = FAMILIES[family], inputs(family)["input_ids"]
    model = get_peft_model(f.build(), of(kind, f.task, num_virtual_tokens=4), "a").eval()
    model.add_adapter("b", of(kind, f.task, num_virtual_tokens=9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **GENERATE}
    given |= {"task_ids": torch.tensor([0, 1, 2, 0])} if kind == "tasks" else {}
    for names in (None, ["a", "b", "__base__", "b"]):
        with torch.compiler.set_stance("force_eager"):
            found, other = (model.generate(**given, adapter_names=names, **o) for o in ({}, FIXED))
        assert torch.equal(found, other)


@pytest.mark.fault("G1")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_cache_of_the_user_is_filled_step_by_step(family: str) -> None:
    f, ids = FAMILIES[family], inputs(family)["input_ids"]
    model = get_peft_model(f.build(), of("prompt", f.task, num_virtual_tokens=4)).eval()
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, :3] = 0
    x = torch.cat([ids, ids[:, :1]], dim=1)
    y = model(input_ids=x, attention_mask=mask).logits
    cache = transformers.StaticCache(config=model.get_base_model().config, max_cache_len=14)
    first = model(
        input_ids=ids, attention_mask=mask[:, :9], use_cache=True, **{CACHE: cache}
    ).logits
    last = model(input_ids=x[:, 9:], attention_mask=mask, use_cache=True, **{CACHE: cache}).logits
    found = torch.cat([first, last], dim=1)
    real = torch.cat([torch.ones(4, 4), mask], dim=1).bool()
    real[1, :3], real[1, 3:7] = False, True  # padding stands on the left
    torch.testing.assert_close(found[real], y[real], **CLOSE)
    small = transformers.StaticCache(config=model.get_base_model().config, max_cache_len=12)
    with pytest.raises(
        StateError, match=r"room for 12 tokens, and 13 are .*max_cache_len=13 or mo"
    ):
        model(input_ids=ids, use_cache=True, **{CACHE: small})


def test_unloaded_and_copied_models_generate_as_before() -> None:
    f, ids = FAMILIES["llama"], inputs("llama")["input_ids"]
    base = f.build()
    model = get_peft_model(base, of("prompt", f.task)).eval()
    found = model.generate(ids, **GENERATE, **FIXED)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.base_model.switch.shared["default"].E.add_(5.0)
        assert torch.equal(twin.generate(ids, **GENERATE, **FIXED), found)
    plain = model.unload()
    assert plain is base and not {MASKS, PREPARE} & vars(plain).keys()


@torch.no_grad()
def test_what_generate_cannot_do_with_virtual_tokens_says_so() -> None:
    f, ids = FAMILIES["t5"], inputs("t5")["input_ids"]
    model = get_peft_model(f.build(), of("prompt", f.task)).eval()
    mask = torch.ones_like(ids)
    if not transformers.__version__.startswith("5.0."):  # which has lost it
        with pytest.raises(StateError, match=r"prefill_chunk_size cuts this mask, .*: leave it"):
            model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **GENERATE)
    f = FAMILIES["llama"]
    model = get_peft_model(f.build(), of("prompt", f.task)).eval()
    first = model.generate(ids, return_dict_in_generate=True, **GENERATE)
    x, cache = torch.cat([first.sequences, ids], dim=1), first[CACHE]
    with pytest.raises(StateError, match="cannot go on from a cache that holds virtual tokens"):
        model.generate(x, **{CACHE: cache}, **GENERATE)
    with pytest.raises(StateError, match="is over 24 tokens; it must be over 23: those in the ca"):
        model(x[:, 15:], attention_mask=torch.ones_like(x), **{CACHE: cache})
    with pytest.raises(StateError, match="attention_mask is a dict; with virtual tokens"):
        model(input_ids=ids, attention_mask={"full_attention": mask[:, None, None]})


# -- weights of integers


def pack(layer: Any, plain: Any) -> None:
    """Give a layer a weight of bytes, and a scale for each of its rows; the rest is as in plain."""
    layer.__dict__.update({k: v for k, v in plain.__dict__.items() if not k.startswith("_")})
    scale = plain.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    layer.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), False)
    layer.register_buffer("scale", scale)
    layer.bias = getattr(plain, "bias", None)


class Int8Linear(nn.Linear):
    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        pack(self, plain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.scale).to(x), self.bias)


class Int8Embedding(nn.Embedding):
    def __init__(self, plain: nn.Embedding) -> None:
        nn.Module.__init__(self)
        pack(self, plain)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight * self.scale)[ids]


def quantised(model: nn.Module, back: bool = False) -> nn.Module:
    """The model with weights of integers; ``back``: with the floats that these stand for."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = Int8Linear if isinstance(child, nn.Linear) else Int8Embedding
            if not isinstance(child, (nn.Linear, nn.Embedding)):
                continue
            if back:
                child.weight.data = (new := kind(child)).weight * new.scale  # type: ignore[arg-type]
            else:
                setattr(module, name, kind(child))  # type: ignore[arg-type]
    return model


@pytest.mark.fault("H2")
@pytest.mark.parametrize("kind", [*KINDS, "sampled"])
def test_a_base_of_integers_is_as_its_floats(kind: str) -> None:
    """Forward, backward, a mixed batch, generation; and its weights stay."""
    f, found = FAMILIES["llama"], []
    more = {"prompt_tuning_init": "SAMPLE_VOCAB"} if kind == "sampled" else {}
    kind = "prompt" if more else kind
    for back in (True, False):
        base = quantised(f.build(), back)
        before = {n: p.detach().clone() for n, p in base.named_parameters()}
        torch.manual_seed(0)
        model = get_peft_model(base, of(kind, f.task, **more), "a")
        model.add_adapter("b", of(kind, f.task, **more))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.dtype == torch.float32 for p in trained)
        with torch.no_grad():
            for p in trained:
                p.add_(0.1)
        x: dict[str, Any] = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
        more_of = {"task_ids": torch.tensor([0, 1, 2, 0])} if kind == "tasks" else {}
        y = model(**x, **more_of)
        y.loss.backward()
        found += [y.logits, *(p.grad for p in trained)]
        names, ids = ["a", "b", "__base__", "a"], x["input_ids"]
        model.eval()
        with torch.no_grad():
            found.append(model(ids, adapter_names=names, **more_of).logits)
            found.append(model.generate(ids, adapter_names=names, **more_of, **GENERATE))
        torch.optim.SGD(trained, lr=0.1).step()
        own = dict(model.unload().named_parameters())
        assert all(torch.equal(own[n], p) for n, p in before.items())
    half = len(found) // 2
    for a, b in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# -- configs that a forward writes to


@pytest.mark.parametrize("labels", [[2, 0], [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
def test_a_classifier_that_has_seen_labels_is_the_same_base(labels: Any, tmp_path: Path) -> None:
    """transformers notes in the config what it concludes from the labels, ``problem_type``."""
    model = get_peft_model(build("bert", "SEQ_CLS"), of("prompt", "SEQ_CLS"))
    x = {**batch("SEQ_CLS"), "labels": torch.tensor(labels)}
    model(**x).loss.backward()
    config = model.get_base_model().config
    assert config.problem_type is not None
    config.pad_token_id, config.eos_token_id = 5, 7  # as a Trainer does, by the tokenizer's
    model.eval().save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(build("bert", "SEQ_CLS"), tmp_path).eval()  # without a warning
    with torch.no_grad():
        torch.testing.assert_close(read(**x).logits, model(**x).logits)
    fresh = get_peft_model(build("bert", "SEQ_CLS"), LoraConfig())
    fresh.save_pretrained(tmp_path / "fresh")
    PeftModel.from_pretrained(read.unload(), tmp_path / "fresh")
