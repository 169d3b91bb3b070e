"""Less work for the same training: batches without padding, frozen blocks run once, and no gradient
below the lowest adapter.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graftwork
from graftwork import LoraConfig, PromptTuningConfig, get_peft_model
from graftwork.errors import TrainingError
from graftwork.train import packing, prefix, show
from graftwork.train.prepare import prepare
from graftwork.train.recipe import RecipeError, build
from graftwork.train.run import Result, StoppedError, resumed, train
from graftwork.train.samples import Sample, Samples, collate
from graftwork.train.show import Silent
from graftwork.train.tasks import TASKS
from prompts.families import DECODERS, FAMILIES
from train import toys
from train.test_loss import largest
from train.test_run import StopAfter

LENGTHS = (5, 20, 3, 12)


def samples(lengths: tuple[int, ...] = LENGTHS) -> Samples:
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 60, n).astype(np.int32) for n in lengths]
    labels = [np.where(np.arange(len(t)) == 2, -100, t) for t in texts]  # one is not learnt
    return Samples([Sample(t, label) for t, label in zip(texts, labels, strict=True)])


def adapted(name: str, config: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=r".*(q_proj|o_proj|c_attn)", init_lora_weights=False)
    return get_peft_model(FAMILIES[name].build(**options), config or lora)


# -- packing


def test_a_packed_row_holds_what_the_padded_batch_does() -> None:
    items = samples().items
    row, rows = packing.pack(items), collate(items, 0)
    assert row["lengths"].tolist() == list(LENGTHS)
    assert row["input_ids"][0].tolist() == [i for s in items for i in s.ids]
    assert row["position_ids"][0].tolist() == [i for n in LENGTHS for i in range(n)]
    learnt = [(t["labels"][:, 1:] != -100).sum() for t in (row, rows)]
    assert learnt[0] == learnt[1]


PACKED = [(name, kernel) for name in DECODERS for kernel in ("eager", "sdpa")]
UNFIT = {"gemma3n": "", "gemma4": ""}


@pytest.mark.parametrize(("name", "kernel"), [p for p in PACKED if p != ("gemma2", "sdpa")])
def test_packed_and_padded_are_one_training(name: str, kernel: str) -> None:
    model = adapted(name, attn_implementation=kernel).train()
    reason = packing.why_not(model, samples(), 0)
    if reason:
        assert name in ("gemma3n", "gemma4") and "differ" in reason
        return
    found = []
    for packed in (False, True):
        model.zero_grad()
        batch = packing.pack(samples().items) if packed else collate(samples().items, 0)
        lengths = batch.pop("lengths", torch.tensor([1]))
        if packed:
            with packing.packed(model, lengths):
                loss = model(**batch).loss
                loss.backward()
        else:
            loss = model(**batch).loss
            loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in trained(model)]))
    (loss, grads), (other, theirs) = found
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    for one, two in zip(grads, theirs, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == kernel and packing._Now.rows is None


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


def test_layers_compute_the_tokens_that_are_there_and_attention_no_square_of_all() -> None:
    model = adapted("llama", attn_implementation="eager").train()
    seen: list[int] = []
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[:-1].numel()))
    items = samples((60, *[10] * 30)).items
    for batch in (collate(items, 0), packing.pack(items)):
        lengths = batch.pop("lengths", None)
        if lengths is None:
            padded = largest(lambda b=batch: model(**b).loss.backward())
            continue
        with packing.packed(model, lengths):
            found = largest(lambda b=batch: model(**b).loss.backward())
    assert seen == [31 * 60, 360]
    assert found <= padded < 4 * 4 * 360 * 360  # the scores are those of the padded batch


def test_models_and_adapters_that_cannot_be_packed() -> None:
    import transformers

    few = samples()
    bloom = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    lora = LoraConfig(target_modules="all-linear")
    model = get_peft_model(transformers.BloomForCausalLM(bloom), lora)
    assert "takes no position_ids" in packing.why_not(model, few, 0)
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert "virtual tokens" in packing.why_not(adapted("llama", prompt), few, 0)
    invoked = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5])
    assert "by what is in them" in packing.why_not(adapted("llama", invoked), few, 0)
    poly = graftwork.PolyConfig(target_modules=["q_proj"])
    assert "by what is in them" in packing.why_not(adapted("llama", poly), few, 0)
    lily = graftwork.LilyConfig(target_modules=["q_proj"])
    assert "sees a row as a whole" in packing.why_not(adapted("llama", lily), few, 0)
    assert "compiled" in packing.why_not(torch.compile(adapted("llama"), backend="eager"), few, 0)


class Leaking(nn.Module):
    """Hands each token something of the one before it, as a convolution over a row does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(x + 0.5 * x.roll(1, 1), *args, **kwargs)


def test_a_model_that_looks_beyond_a_sample_is_found_out() -> None:
    model = adapted("llama")
    layers = model.get_base_model().model.layers
    layers[1] = Leaking(layers[1])
    assert "the losses of tokens differ by" in packing.why_not(model, samples(), 0)
    plain = layers[1].forward

    def strict(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(x.reshape(4, -1, 32).flatten(0, 1)[None].view(x.shape), *args, **kwargs)

    layers[1].forward = strict
    few = samples((4, 4, 4, 3))
    assert "RuntimeError on trying: shape '[4, -1, 32]'" in packing.why_not(model, few, 0)
    layers[1].forward = lambda *args, **kwargs: plain(None)
    with pytest.raises(AttributeError):  # padded, it fails too: that is no reason to pad
        packing.why_not(model, samples(), 0)


def test_what_padding_takes() -> None:
    few = samples((4, 1, 2, 2))
    assert packing.saved(few, [0, 1, 2, 3], 2) == pytest.approx(3 / 12)
    assert packing.saved(few, [2, 3, 1], 2) == 0


# -- the whole pipeline

FAST = {"batch_size": 6, "learning_rate": 1e-2, "precision": "fp32", "epochs": 3}
TOP = {"target_modules": "q_proj,v_proj", "layers_to_transform": [1]}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    rows: list[tuple[str, ...]] = []
    for _ in range(40):
        words = draw.choices(toys.GOOD, k=draw.choice([2, 3, 12, 25]))
        rows.append(("say " + " ".join(words), " ".join(reversed(words))))
    folder = tmp_path_factory.mktemp("uneven")
    return toys.write_table(folder / "uneven.jsonl", rows, ("prompt", "completion"))


def run(model: Path, data: Path, output: Path, **settings: Any) -> Result:
    given = {**FAST, "model": str(model), "data": str(data), "output": str(output), **settings}
    return train(build(given)[0], Silent())


def same(one: Result, other: Result) -> None:
    mine, theirs = (load_file(r.output / "adapter_model.safetensors") for r in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
    assert one.after["loss"] == pytest.approx(other.after["loss"], rel=1e-5)


def lines(found: Result) -> dict[str, str]:
    return dict(show.plan_lines(found.prepared))


def test_a_training_is_the_same_in_every_way(llama: Path, uneven: Path, tmp_path: Path) -> None:
    more = {"gradient_accumulation": 2}
    plain = run(llama, uneven, tmp_path / "p", fused_loss="off", packing="off", **more)
    assert lines(plain)["loss"] == "from whole logits: the recipe says so"
    assert lines(plain)["batches"] == "padded: the recipe says so"
    less = run(llama, uneven, tmp_path / "l", **more)
    assert "without whole logits" in lines(less)["loss"]
    assert lines(less)["batches"].startswith("packed, without padding (")
    assert show.plan_json(less.prepared)["batches"] == lines(less)["batches"]
    again = run(llama, uneven, tmp_path / "c", gradient_checkpointing=True, packing="on", **more)
    same(plain, less)
    same(plain, again)
    assert less.before == pytest.approx(plain.before, rel=1e-5)


def test_half_precision_takes_the_same_ways(llama: Path, uneven: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"precision": "bf16", "cache_prefix": True, "epochs": 2, **TOP}
    less = run(llama, uneven, tmp_path / "l", **more)
    assert "a part of the rows at a time, without whole logits" in lines(less)["loss"]
    assert lines(less)["batches"].startswith("packed") and "prefix" in lines(less)
    plain = run(
        llama, uneven, tmp_path / "p", fused_loss="off", packing="off",
        **{**more, "cache_prefix": False},
    )  # fmt: skip
    assert less.after["loss"] == pytest.approx(plain.after["loss"], rel=2e-2)


def test_packing_where_it_does_not_pay_or_cannot_be(
    llama: Path, bert: Path, answers: Path, reviews: Path, tmp_path: Path
) -> None:
    few = run(llama, answers, tmp_path / "a", steps=1, epochs=None)  # all of one length
    assert lines(few)["batches"].startswith("padded: only 0.0% of the tokens")
    assert few.prepared.ways.spared == 0
    given = {"num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM", "method": "PROMPT_TUNING"}
    with pytest.raises(RecipeError, match=r"--packing on: .*virtual tokens in front of each row"):
        run(llama, answers, tmp_path / "b", packing="on", **given)
    with pytest.raises(RecipeError, match="--packing on: the task classification has no loss for"):
        run(bert, reviews, tmp_path / "c", packing="on")
    assert "batches" not in lines(run(bert, reviews, tmp_path / "d", steps=1, epochs=None))


class Counted:
    """Counts how often the layers of some blocks run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = {0: 0, 1: 0}
        from transformers.models.llama.modeling_llama import LlamaMLP

        plain = LlamaMLP.forward
        blocks: dict[int, int] = {}

        def forward(mlp: nn.Module, x: Tensor) -> Tensor:
            number = blocks.setdefault(id(mlp), len(blocks) % 2)
            self.rows[number] += mlp.training
            return plain(mlp, x)

        monkeypatch.setattr(LlamaMLP, "forward", forward)


@pytest.mark.parametrize("packed", ["on", "off"])
@pytest.mark.parametrize("gb", [1.0, 1e-6], ids=["memory", "file"])
def test_frozen_blocks_run_once(
    packed: str, gb: float, llama: Path, uneven: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more = {**TOP, "packing": packed, "cache_prefix_gb": gb, "lora_dropout": 0.3}
    plain = run(llama, uneven, tmp_path / "p", **more)
    counted, files = Counted(monkeypatch), []
    read = prefix.Cache.read

    def watched(self: prefix.Cache, *args: Any) -> Tensor:
        files.append(self.file is not None and self.file.is_file())
        return read(self, *args)

    monkeypatch.setattr(prefix.Cache, "read", watched)
    kept = run(llama, uneven, tmp_path / "k", cache_prefix=True, **more)
    same(plain, kept)
    steps = kept.prepared.plan.steps
    assert steps == 18 and counted.rows[1] >= steps
    assert counted.rows[0] <= 6 + 6  # the batches of one pass, and what was tried before
    assert set(files) == {gb < 0.1} and len(files) == steps + 1
    assert "first 1 of 2 blocks run once" in lines(kept)["prefix"]
    assert sorted(p.name for p in (tmp_path / "k").parent.iterdir()) == ["k", "p"]


def test_frozen_blocks_of_a_classifier(bert: Path, reviews: Path, tmp_path: Path) -> None:
    more = {"target_modules": "query", "layers_to_transform": [1], "epochs": 2}
    plain = run(bert, reviews, tmp_path / "p", **more)
    kept = run(bert, reviews, tmp_path / "k", cache_prefix=True, **more)
    same(plain, kept)


def test_a_stopped_run_with_kept_states_resumes_to_the_same_bits(
    llama: Path, uneven: Path, tmp_path: Path
) -> None:
    whole = run(llama, uneven, tmp_path / "whole", cache_prefix=True, **TOP)
    given = {
        **FAST, **TOP, "model": str(llama), "data": str(uneven), "cache_prefix": True,
        "output": str(tmp_path / "broken"),
    }  # fmt: skip
    screen = StopAfter(8, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedError):
        train(build(given)[0], screen)
    assert not (tmp_path / "broken.partial" / prefix.FILE).exists()
    broken = train(resumed({"output": str(tmp_path / "broken")}), Silent(), resume=True)
    mine, theirs = (load_file(r.output / "adapter_model.safetensors") for r in (whole, broken))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_states_that_cannot_be_kept(
    llama: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(text: str, error: type[Exception] = RecipeError, **settings: Any) -> None:
        with pytest.raises(error, match=text):
            run(llama, uneven, tmp_path / "x", **{"cache_prefix": True, **TOP, **settings})
        assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()

    refused("the lowest of model.layers is adapted.*--layers-to-transform", layers_to_transform=[0])
    refused("second epoch on, and this training has 1", epochs=1)
    refused("dropout is on below it.*--base-dropout 0", base_dropout=0.1)
    refused(
        "virtual tokens in front of the lowest block", method="PROMPT_TUNING",
        prompt_tuning_init="RANDOM", target_modules=None, layers_to_transform=None,
    )  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        refused(r"--cache-prefix needs 0.0 GB.*has 0.0 GB", TrainingError, cache_prefix_gb=1e-6)

    def elsewhere(self: prefix.Cache, *args: Any) -> Tensor:
        return 1.1 * read(self, *args)

    read = prefix.Cache.read
    monkeypatch.setattr(prefix.Cache, "read", elsewhere)
    refused("from the kept states the loss is .* depends on more than", TrainingError)


def test_a_stack_is_found_by_what_its_blocks_are_given() -> None:
    top = LoraConfig(target_modules=r".*\.1\..*(q_proj|c_attn|query)")
    for name, path in {
        "gpt2": "transformer.h", "mistral": "model.layers", "gemma3": "model.layers",
        "bert": "encoder.layer", "roberta": "encoder.layer",
    }.items():  # fmt: skip
        found = prefix.find(adapted(name, top), samples(), 0)
        assert (found.path, found.count, found.every) == (path, 1, 2)
        assert found.size == sum(LENGTHS) * 32 * 4
    two = LoraConfig(target_modules=["q", "v"])
    with pytest.raises(RecipeError, match="two stacks of blocks"):
        prefix.find(adapted("t5", two), samples(), 0)
    tokens = LoraConfig(
        target_modules=["q_proj"], layers_to_transform=[1], trainable_token_indices=[3]
    )
    with pytest.raises(RecipeError, match="or something below it is"):
        prefix.find(adapted("llama", tokens), samples(), 0)
    head = LoraConfig(target_modules=["lm_head"])
    with pytest.raises(RecipeError, match=r"nothing in model.layers is adapted"):
        prefix.find(adapted("llama", head), samples(), 0)


# -- no gradient below the lowest adapter


def deep(layers: int, **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {**FAMILIES["llama"].fields, "num_hidden_layers": layers}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))


def backward_work(model: Any) -> tuple[int, int]:
    """The tensors that are saved for the backward pass, and the products in it."""
    saved: list[int] = []
    products: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            products.extend([func.name()] if func.name() in ("aten::mm", "aten::bmm") else [])
            return func(*args, **(kwargs or {}))

    model.train()
    ids = torch.randint(3, 60, (2, 7))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    with Count():
        loss.backward()
    return len(saved), len(products)


def test_what_is_below_the_lowest_adapter_has_no_backward_pass() -> None:
    found = [
        backward_work(
            get_peft_model(
                deep(n), LoraConfig(target_modules=["q_proj"], layers_to_transform=[n - 1])
            )
        )
        for n in (2, 6)
    ]
    assert found[0] == found[1]
    through = get_peft_model(
        deep(6), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0])
    )
    assert backward_work(through)[1] > 2 * found[1][1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_asks_for_gradients_of_the_embeddings_only_where_it_must(
    reentrant: bool,
) -> None:
    base = deep(3)
    enable = getattr(base, "activation_checkpointing_enable", None)
    (enable or base.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    base.disable_input_require_grads()
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], layers_to_transform=[2]))
    asked: list[bool] = []
    base.model.layers[1].register_forward_pre_hook(
        lambda _, args: asked.append(args[0].requires_grad)
    )
    ids = torch.randint(3, 60, (2, 7))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of reentrant checkpointing
        model(input_ids=ids, labels=ids).loss.backward()
    assert asked[0] is reentrant
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_training_loop_asks_for_none(llama: Path, answers: Path, tmp_path: Path) -> None:
    given = {
        **FAST, **TOP, "model": str(llama), "data": str(answers), "output": str(tmp_path / "o"),
        "gradient_checkpointing": True,
    }  # fmt: skip
    model: Any = prepare(build(given)[0], lambda _: None).model
    asked: list[bool] = []
    model.get_base_model().model.layers[1].register_forward_pre_hook(
        lambda _, args: asked.append(args[0].requires_grad)
    )
    ids = torch.randint(3, 30, (2, 7))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert asked[0] is False
    assert TASKS["instruction"].model_class == "AutoModelForCausalLM"
