"""Several prompts as one: the rows of both, or their weighted sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
from prompts.families import FAMILIES, inputs, result

from .rows import EXAMPLES, build

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TASKS = {"num_tasks": 1, "num_ranks": 2}
TABLE = {"prefix_projection": True, "encoder_hidden_size": 12}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5}
# family, two prompts and their fields beside the length, the kind of both together
Pair = tuple[str, Any, dict[str, Any], Any, dict[str, Any], str]
PAIRS: dict[str, Pair] = {
    "rows": ("llama", PromptTuningConfig, {}, PromptTuningConfig, {}, "PROMPT_TUNING"),
    "made": ("gpt2", PromptEncoderConfig, {}, PromptEncoderConfig, LSTM, "PROMPT_TUNING"),
    "task": ("llama", MultitaskPromptTuningConfig, TASKS, PromptTuningConfig, {}, "PROMPT_TUNING"),
    "cpt": ("llama", CPTConfig, EXAMPLES, PromptTuningConfig, {}, "PROMPT_TUNING"),
    "encoder": ("t5", PromptTuningConfig, {}, PromptEncoderConfig, {}, "PROMPT_TUNING"),
    "decoder": ("t5", *(MultitaskPromptTuningConfig, TASKS) * 2, "MULTITASK_PROMPT_TUNING"),
    "bert": ("bert", PromptTuningConfig, {}, PromptEncoderConfig, {}, "PROMPT_TUNING"),
    "picture": ("vit", PromptTuningConfig, {}, PromptTuningConfig, {}, "PROMPT_TUNING"),
    "keys": ("llama", PrefixTuningConfig, {}, PrefixTuningConfig, TABLE, "PREFIX_TUNING"),
    "keys_t5": ("t5", PrefixTuningConfig, TABLE, PrefixTuningConfig, {}, "PREFIX_TUNING"),
    "deep": ("bert", PTuningV2Config, {}, PTuningV2Config, TABLE, "P_TUNING_V2"),
    "deep_t5": ("t5", PTuningV2Config, {}, PTuningV2Config, {}, "P_TUNING_V2"),
    "text": ("llama", *(CartridgeConfig, {"num_frozen_tokens": 2}) * 2, "CARTRIDGE"),
    "mixed": ("gemma4", CartridgeConfig, {}, PTuningV2Config, {}, "PREFIX_TUNING"),
}


def made(pair: str, first: int = 3, second: int = 5) -> PeftModel:
    """A model with two prompts, a and b, that train."""
    name, *kinds, _ = PAIRS[pair]
    family = FAMILIES[name]
    torch.manual_seed(4)
    common = {"task_type": family.task}
    a, b = (
        kind(**{"num_virtual_tokens": n, **more, **common})
        for kind, more, n in ((*kinds[:2], first), (*kinds[2:], second))
    )
    model = get_peft_model(family.build(), a, "a")
    model.add_adapter("b", b)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # CPT's changes start at zero
                parameter.add_(0.01)
    return model


@torch.no_grad()
def run(model: Any, family: str, *names: str, **options: Any) -> Tensor:
    if names:
        with model.base_model.using(*names):
            return result(model(**inputs(family), **options))
    return result(model(**inputs(family), **options))


@pytest.mark.parametrize("pair", PAIRS)
def test_behind_each_other_is_as_both_at_once(pair: str, tmp_path: Path) -> None:
    family, *_, kind = PAIRS[pair]
    model = made(pair)
    assert model.add_weighted_adapter(["a", "b"], [1, 1], "both", "cat") == {}
    assert model.active_adapters == ["a"]
    model.eval()
    y = run(model, family, "both")
    torch.testing.assert_close(y, run(model, family, "a", "b"), **CLOSE)
    assert y.shape != run(model, family, "a").shape or not torch.allclose(
        y, run(model, family, "a"), atol=1e-4
    )
    config = model.peft_config["both"]
    assert config.method == kind and config.inference_mode
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    read = PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path / "both").eval()
    assert torch.equal(run(read, family), y)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_prompts_of_several_tasks_keep_their_rows(family: str, tmp_path: Path) -> None:
    f = FAMILIES[family]
    a, b = (
        MultitaskPromptTuningConfig(
            num_tasks=3, num_ranks=r, num_virtual_tokens=n, task_type=f.task
        )
        for r, n in ((1, 3), (2, 5))
    )
    model = get_peft_model(f.build(), a, "a")
    model.add_adapter("b", b)
    model.eval()
    rows = len(next(iter(inputs(family).values())))
    tasks = {"task_ids": torch.tensor([2, 0, 1, 2, 0, 1, 2, 0])[:rows]}
    model.add_weighted_adapter(["a", "b"], [1, 1], "both", "cat")
    y = run(model, family, "both", **tasks)
    torch.testing.assert_close(y, run(model, family, "a", "b", **tasks), **CLOSE)
    config = model.peft_config["both"]
    assert (config.num_tasks, config.num_ranks, config.num_virtual_tokens) == (3, 3, 8)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    read = PeftModel.from_pretrained(f.build(), tmp_path / "both").eval()
    assert torch.equal(run(read, family, **tasks), y)


@pytest.mark.parametrize("pair", [n for n in PAIRS if n != "cpt"])  # whose length is that of a text
def test_the_sum_is_of_the_rows(pair: str) -> None:
    family, model = PAIRS[pair][0], made(pair, 4, 4).eval()
    for name in "ab":
        model.add_weighted_adapter([name, name], [0.5, 0.5], f"{name}{name}", "linear")
        torch.testing.assert_close(
            run(model, family, f"{name}{name}"), run(model, family, name), **CLOSE
        )
    model.add_weighted_adapter(["a", "b"], [2.0, -0.5], "c", "linear")
    a, b, c = (model.base_model.switch.shared[name].whole() for name in ("aa", "bb", "c"))
    torch.testing.assert_close(c, 2 * a - 0.5 * b)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers")
@pytest.mark.parametrize(
    "pair", [n for n in PAIRS if FAMILIES[PAIRS[n][0]].task and "deep" not in n]
)
def test_peft_reads_it(pair: str, tmp_path: Path) -> None:
    """But for P-tuning v2, which it does not have, and models without a task, where it does
    nothing.
    """
    peft, family = pytest.importorskip("peft"), PAIRS[pair][0]
    model = made(pair).eval()
    model.add_weighted_adapter(["a", "b"], [1, 1], "both", "cat")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    theirs = peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path / "both").eval()
    x = inputs(family)
    if pair == "decoder":  # of a decoder's tokens PEFT lengthens those that it makes of labels
        labels = x.pop("decoder_input_ids")
        x |= {"labels": labels, "task_ids": torch.zeros(4, dtype=torch.long)}
    with torch.no_grad(), model.base_model.using("both"):
        y, other = result(model(**x)), result(theirs(**x))
    torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)


@pytest.mark.fault("G4")
def test_it_is_an_adapter_as_any_other() -> None:
    """A row of a batch with it, written step by step, trained, renamed, dropped."""
    model = made("rows")
    model.add_weighted_adapter(["a", "b"], [1, 1], "c", "cat")
    model.add_adapter("lora", LoraConfig(init_lora_weights=False))
    model.eval()
    names, x = ["c", "a", "__base__", "lora"], inputs("llama")
    mixed = run(model, "llama", adapter_names=names)
    written = model.generate(x["input_ids"], adapter_names=names, max_new_tokens=4, pad_token_id=0)
    for i, name in enumerate(names):
        with model.base_model.using(*([name] if name != "__base__" else [])), torch.no_grad():
            torch.testing.assert_close(
                mixed[i, -9:], model(x["input_ids"][i : i + 1]).logits[0, -9:], rtol=1e-5, atol=1e-5
            )
            alone = model.generate(x["input_ids"][i : i + 1], max_new_tokens=4, pad_token_id=0)
        assert torch.equal(alone[0, -4:], written[i, -4:])
    model.set_adapter("c")
    model.delete_adapter("a")
    model.base_model.rename_adapter("c", "d")
    torch.testing.assert_close(run(model, "llama")[:1, -9:], mixed[:1, -9:], rtol=1e-5, atol=1e-5)
    before = model.base_model.switch.shared["d"].E.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    optimizer.step()
    assert (model.base_model.switch.shared["d"].E != before).any(1).all()
    with pytest.raises(StateError, match=r"'d' is no update of a weight at model.embed_tokens: it"):
        model.to_lora("d", "e")
    with pytest.raises(StateError, match="'d' is no update of a weight"):
        model.resize_adapter("d", 4)
    assert list(model.peft_config) == ["b", "d", "lora"] and model.active_adapters == ["d"]


def test_trained_heads_are_added_up_or_refused() -> None:
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, bias="all")
    model = get_peft_model(build("bert", "SEQ_CLS"), config, "a")
    model.add_adapter("b", config)
    own = dict(model.named_parameters())
    head = "base_model.model.classifier.adapters.{}.copy.module.weight"
    bias = "base_model.model.bert.pooler.dense.adapters.{}.bias.bias"
    base = own["base_model.model.classifier.base_layer.weight"]
    with torch.no_grad():
        for name in "ab":
            for key in (head, bias):
                own[key.format(name)].add_(torch.randn(own[key.format(name)].shape))
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "c", "linear")
    new = dict(model.named_parameters())
    a, b, c = (new[head.format(name)] for name in "abc")
    torch.testing.assert_close(c, base + 0.5 * (a - base) + 2 * (b - base))
    start = new["base_model.model.bert.pooler.dense.base_layer.bias"]
    a, b, c = (new[bias.format(name)] for name in "abc")
    torch.testing.assert_close(c, start + 0.5 * (a - start) + 2 * (b - start))
    with pytest.raises(
        StateError, match=r"\['a', 'b'\] train .* as a whole, of which only one can"
    ):
        model.add_weighted_adapter(["a", "b"], [1, 1], "d", "cat")
    assert "d" not in model.peft_config


def test_what_cannot_be_one() -> None:
    model = made("rows")
    for name, config in {
        "lora": LoraConfig(),
        "keys": PrefixTuningConfig(),
        "less": PrefixTuningConfig(num_layers=1),
        "tasks": MultitaskPromptTuningConfig(num_tasks=3),
        "gate": AdaptionPromptConfig(adapter_layers=1),
        "gate2": AdaptionPromptConfig(adapter_layers=1),
    }.items():
        model.add_adapter(name, config)
    cases = [
        ("a b", [1, 1], "svd", r"'svd' is not known for prompts; .* use 'cat', .* or 'linear', "),
        ("a b", [1, 1], "dare_ties", "'dare_ties' is not known for prompts"),
        ("a b", [1, 1], "liner", "did you mean 'linear'"),
        ("a b", [1, 0.5], "cat", r"\[1, 0.5\] have no meaning with 'cat'"),
        ("a b", [1, 1], "linear", r"these have \{'a': 3, 'b': 5\}: use 'cat'"),
        ("a lora", [1, 1], "cat", r"'lora' of updates of weights. .*set_adapter\(\['a', 'lora'\]"),
        ("keys a", [1, 1], "cat", "'keys' of keys and values, 'a' of virtual tokens"),
        ("keys less", [1, 1], "cat", "'keys' and 'less' differ in the attentions that read"),
        ("a tasks", [1, 1], "cat", "3 tasks has other rows for each task"),
        ("gate gate2", [1, 1], "cat", r"adaption prompts cannot be one, .*set_adapter"),
        ("a q", [1, 1], "cat", "there is no adapter 'q'"),
        ("a", [1, 1], "cat", "give a weight for each of 1 adapters"),
    ]
    known = list(model.peft_config)
    for names, weights, how, text in cases:
        with pytest.raises(StateError, match=text):
            model.add_weighted_adapter(names.split(), weights, "new", how)
    with pytest.raises(StateError, match="svd_rank, energy and density are about updates"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "new", "cat", svd_rank=3)
    assert list(model.peft_config) == known
    for first, second in ((PTuningV2Config, PrefixTuningConfig),
                          (PromptTuningConfig, MultitaskPromptTuningConfig)):  # fmt: skip
        task = FAMILIES["t5"].task
        model = get_peft_model(FAMILIES["t5"].build(), first(task_type=task), "a")
        model.add_adapter("b", second(task_type=task))
        with pytest.raises(StateError, match=r"'a' and 'b' differ in .*set_adapter"):
            model.add_weighted_adapter(["a", "b"], [1, 1], "c", "cat")


def test_what_a_network_made_in_training_is_without_dropout() -> None:
    model = made("made").train()
    model.add_weighted_adapter(["b", "b"], [0.5, 0.5], "c", "linear")
    prompt = model.base_model.switch.shared["b"]
    torch.testing.assert_close(model.base_model.switch.shared["c"].E, prompt.eval().whole())
