"""Prompts of embeddings: rows of mixed batches, padding, generation, heads, starts, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import graftwork
from graftwork import (
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    StateError,
    get_peft_model,
)  # fmt: skip
from graftwork.errors import POLICY
from graftwork.testing.bench import shake
from tiny import enable_checkpointing

from .rows import EXAMPLES, METHODS, batch, build

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WORDS = ["<unk>", "<s>", "</s>", "good", "bad", "film", "a", "was", "it", "very"]


def shared(model: Any, name: str = "default") -> Any:
    return model.base_model.switch.shared[name]


def several(family: str, task: str) -> Any:
    """Prompts of all methods and of several lengths in one model, and a LoRA."""
    torch.manual_seed(1)
    wide = {"num_tasks": 4, "num_ranks": 2, "task_type": task}
    configs = {
        "tasks": MultitaskPromptTuningConfig(num_virtual_tokens=3, **wide),
        "more": MultitaskPromptTuningConfig(num_virtual_tokens=6, **wide | {"num_tasks": 2}),
        "mlp": PromptEncoderConfig(num_virtual_tokens=2, task_type=task),
        "lora": LoraConfig(init_lora_weights=False, task_type=task),
    }
    if task == "CAUSAL_LM":
        configs["cpt"] = CPTConfig(task_type=task, **EXAMPLES)
    model = get_peft_model(build(family, task), configs["tasks"], "tasks")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    for name in configs:
        model.set_requires_grad(name)
    with torch.no_grad():
        shake(model)
    return model.eval()


ROWS = ["more", "tasks", "__base__", "cpt", "tasks", "mlp", "lora"]
TASK_IDS = torch.tensor([1, 3, 9, 0, 2, -1, 0])  # those of rows without tasks are not read


def rows_for(task: str) -> tuple[list[str], Tensor]:
    keep = [i for i, name in enumerate(ROWS) if name != "cpt" or task == "CAUSAL_LM"]
    return [ROWS[i] for i in keep], TASK_IDS[keep]


PLACES = [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"),
          ("bart", "SEQ_2_SEQ_LM")]  # fmt: skip


@pytest.mark.parametrize(("family", "task"), PLACES)
@torch.no_grad()
def test_a_row_with_its_prompt_and_task_is_as_alone(family: str, task: str) -> None:
    model, (names, tasks) = several(family, task), rows_for(task)
    ids, mask = torch.randint(3, 60, (len(names), 9)), torch.ones(len(names), 9, dtype=torch.long)
    mask[0, :3], mask[1, 7:], mask[4, :2], mask[4, 8:] = 0, 0, 0, 0
    given = {"decoder_input_ids": torch.randint(3, 60, (len(names), 5))} if "SEQ" in task else {}
    mixed = model(
        input_ids=ids, attention_mask=mask, adapter_names=names, task_ids=tasks, **given
    ).logits
    for i, name in enumerate(names):
        seen = mask[i].bool()
        one = {"input_ids": ids[i : i + 1, seen], **{k: v[i : i + 1] for k, v in given.items()}}
        with model.base_model.using(*([name] if name != "__base__" else [])):
            alone = model(**one, task_ids=tasks[i : i + 1]).logits[0]
        row = mixed[i, -9:][seen] if task == "CAUSAL_LM" else mixed[i]
        torch.testing.assert_close(row[-5:], alone[-5:], **CLOSE)


@pytest.mark.parametrize(("family", "task"), PLACES)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_is_the_full_forward_of_each_row(family: str, task: str, beams: int) -> None:
    model, (names, tasks) = several(family, task), rows_for(task)
    ids, mask = torch.randint(3, 60, (len(names), 6)), torch.ones(len(names), 6, dtype=torch.long)
    mask[0, :3], mask[4, :2] = 0, 0
    options: dict[str, Any] = {
        "max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None,
        "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    found = model.generate(
        input_ids=ids, attention_mask=mask, adapter_names=names, task_ids=tasks, **options
    )
    for i, name in enumerate(names):
        one = ids[i : i + 1, mask[i].bool()]
        with model.base_model.using(*([name] if name != "__base__" else [])):
            alone = model.generate(input_ids=one, task_ids=tasks[i : i + 1], **options)
            assert torch.equal(alone.sequences[0, -5:], found.sequences[i, -5:])
            if beams > 1:
                continue
            last = alone.sequences[:, :-1]
            given = {"input_ids": last} if task == "CAUSAL_LM" else {
                "input_ids": one, "decoder_input_ids": last}  # fmt: skip
            whole = model(**given, task_ids=tasks[i : i + 1]).logits[0, -5:]
        for got in (alone.logits, [step[i : i + 1] for step in found.logits]):
            torch.testing.assert_close(torch.cat([*got]), whole, **CLOSE)


def test_spans_and_labels_move_with_the_tokens() -> None:
    config = {"num_virtual_tokens": 4}
    model = get_peft_model(
        build("bert", "QUESTION_ANS"), PromptTuningConfig(task_type="QUESTION_ANS", **config)
    )
    given, mask = batch("QUESTION_ANS"), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0  # the virtual tokens stand behind this padding
    start, end = torch.tensor([3, 1]), torch.tensor([5, 7])  # 7: outside, which does not count
    given |= {"attention_mask": mask, "start_positions": start, "end_positions": end[:, None]}
    out = model(**given)
    assert out.start_logits.shape == (2, 11)
    wanted = [
        nn.functional.cross_entropy(logits, place, ignore_index=11)
        for logits, place in ((out.start_logits, start + 4), (out.end_logits, end + 4))
    ]
    torch.testing.assert_close(out.loss, sum(wanted) / 2)
    model = get_peft_model(
        build("bert", "TOKEN_CLS"), PromptTuningConfig(task_type="TOKEN_CLS", **config)
    )
    labels = torch.tensor([[0, 1, 2, 0, 1, 2, -100]]).expand(2, -1)
    out = model(**batch("TOKEN_CLS", padded=False), labels=labels)
    want = nn.functional.cross_entropy(out.logits[:, 4:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, want)


def test_labels_of_a_row_stay_where_they_are() -> None:
    base: Any = build("bert", "SEQ_CLS")
    base.config.problem_type = "multi_label_classification"
    model = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    given = {k: v[:, :3] for k, v in batch("", padded=False).items()}
    model(**given, labels=torch.tensor([[1.0, 0, 0], [0, 1, 1]])).loss.backward()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["left", "right", "both"])
@torch.no_grad()
def test_a_classifier_finds_the_last_token_of_a_padded_row(family: str, padding: str) -> None:
    model = get_peft_model(
        build(family, "SEQ_CLS"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    ).eval()
    ids, mask = torch.randint(3, 60, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, : 3 * (padding != "right")] = 0
    mask[1, 8 - 2 * (padding != "left") :] = 0
    ids[mask == 0] = 0
    together = model(input_ids=ids, attention_mask=mask).logits
    for i in range(2):
        alone = model(input_ids=ids[i : i + 1, mask[i].bool()]).logits
        torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)


# -- starts


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A folder with a tokenizer of a few words that puts <s> in front."""
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path)
    return str(tmp_path)


def start(task: str = "CAUSAL_LM", family: str = "llama", **options: Any) -> tuple[Tensor, Tensor]:
    """E at its start, and the model's embeddings."""
    torch.manual_seed(4)
    model: Any = get_peft_model(build(family, task), PromptTuningConfig(task_type=task, **options))
    return shared(model).E.detach(), model.get_base_model().get_input_embeddings().weight


@pytest.mark.parametrize("n", [3, 4, 10])
def test_a_text_is_cut_or_repeated(n: int, tokenizer: str) -> None:
    rows, table = start(
        num_virtual_tokens=n, prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text="it was good", tokenizer_name_or_path=tokenizer,
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    assert torch.equal(rows, table[([1, 8, 7, 3] * 3)[:n]])


def test_a_text_fills_the_rows_of_both_stacks(tokenizer: str) -> None:
    rows, table = start(
        "SEQ_2_SEQ_LM", "t5", num_virtual_tokens=3, prompt_tuning_init="TEXT",
        prompt_tuning_init_text="bad", tokenizer_name_or_path=tokenizer,
    )  # fmt: skip
    assert torch.equal(rows, table[[1, 4, 1, 4, 1, 4]])


def test_labels_are_the_start(tokenizer: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_virtual_tokens": 5, "prompt_tuning_init": "LABELS",
        "prompt_tuning_init_labels": ["very bad", "good"], "tokenizer_name_or_path": tokenizer,
    }  # fmt: skip
    rows, table = start(**options)
    torch.testing.assert_close(rows[0], table[[9, 4]].mean(0))
    assert torch.equal(rows[1], table[3])
    assert all((table == row).all(1).any() for row in rows[2:])  # as SAMPLE_VOCAB
    config = PromptTuningConfig(**options)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert "prompt_tuning_init_labels" not in PromptTuningConfig().to_dict()


@pytest.mark.parametrize("options", [{"inference_mode": True}, {}])
def test_a_file_needs_no_tokenizer(options: dict[str, Any], tokenizer: str, tmp_path: Path) -> None:
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prompt_tuning_init="TEXT",
        prompt_tuning_init_text="bad", tokenizer_name_or_path=tokenizer, **options
    )  # fmt: skip
    model = get_peft_model(build("llama", "CAUSAL_LM"), config)
    model.save_pretrained(tmp_path / "saved")
    (Path(tokenizer) / "tokenizer.json").unlink()
    again = PeftModel.from_pretrained(build("llama", "CAUSAL_LM"), tmp_path / "saved")
    assert torch.equal(shared(again).E, shared(model).E)


ENUMS = [
    (PromptTuningConfig, "prompt_tuning_init", PromptTuningInit.SAMPLE_VOCAB),
    (PromptTuningConfig, "prompt_tuning_init", PromptTuningInit.RANDOM),
    (MultitaskPromptTuningConfig, "prompt_tuning_init", MultitaskPromptTuningInit.RANDOM),
    (PromptEncoderConfig, "encoder_reparameterization_type",
     PromptEncoderReparameterizationType.LSTM),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field", "member"), ENUMS)
def test_members_and_strings_are_the_same(
    kind: Any, field: str, member: Any, tmp_path: Path
) -> None:
    for given in (member, member.value):
        config = kind(**{field: given})
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())[field] == member.value
        read = PeftConfig.from_pretrained(tmp_path)
        assert read == config and getattr(read, field) == member == member.value


def test_the_width_of_the_table_is_that_of_the_prompt() -> None:
    from transformers import ElectraConfig, ElectraModel

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = ElectraModel(ElectraConfig(**sizes, embedding_size=8, intermediate_size=16))
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=3))
    assert shared(model).E.shape == (3, 8)
    assert model(torch.ones(1, 4, dtype=torch.long)).last_hidden_state.shape == (1, 7, 16)


# -- errors

SOURCE = "AVERAGE_SOURCE_TASKS"
REFUSED = [
    (PromptTuningConfig, {"prompt_tuning_init": "TEX"}, "did you mean 'TEXT'"),
    (PromptTuningConfig, {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
     "prompt_tuning_init='TEXT' needs tokenizer_name_or_path, which is not set"),
    (PromptTuningConfig, {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"},
     "prompt_tuning_init='TEXT' needs prompt_tuning_init_text"),
    (PromptTuningConfig, {"prompt_tuning_init": "LABELS", "tokenizer_name_or_path": "a"},
     "prompt_tuning_init='LABELS' needs prompt_tuning_init_labels"),
    (PromptTuningConfig, {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs is of .* leave it out"),
    (PromptTuningConfig, {"prompt_tuning_init_text": "a"},
     "prompt_tuning_init_text has no effect with prompt_tuning_init='RANDOM'; 'TEXT' uses it"),
    (PromptTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1"),
    (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, "one of .*'MLP', 'LSTM'"),
    (PromptEncoderConfig, {"encoder_num_layers": 3}, "is of the LSTM; the MLP always has three"),
    (PromptEncoderConfig, {"encoder_dropout": 0.1}, "encoder_dropout acts between the layers"),
    (MultitaskPromptTuningConfig, {"prompt_tuning_init": SOURCE},
     f"'{SOURCE}' needs prompt_tuning_init_state_dict_path"),
    (CPTConfig, {}, "give task_type='CAUSAL_LM', not None"),
    (CPTConfig, {"task_type": "SEQ_CLS"}, "not 'SEQ_CLS'"),
    (CPTConfig, {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1]},
     "cpt_mask has 1 entries and cpt_token_ids 2"),
    (CPTConfig, {"task_type": "CAUSAL_LM", "cpt_token_ids": []}, "cpt_mask has 0 entries"),
    (CPTConfig, {"task_type": "CAUSAL_LM", "cpt_tokens_type_mask": [-3]}, "a number below 0"),
    (CPTConfig, {"task_type": "CAUSAL_LM", "cpt_mask": [0]}, "leave tokens out of cpt_token_ids"),
    (CPTConfig, {"task_type": "CAUSAL_LM", "opt_loss_decay_factor": 0.5}, "='decay'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "text"), REFUSED)
def test_what_a_config_refuses(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**options)


def test_as_peft_only_warns_of_what_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICY, "lenient", True)
    with pytest.warns(graftwork.PeftWarning, match="encoder_num_layers=3 is of the LSTM"):
        PromptEncoderConfig(encoder_num_layers=3)
    PromptEncoderConfig(encoder_num_layers=3, inference_mode=True)  # of a file: it only answers


BUILT = [
    ({"prompt_tuning_init": "LABELS", "prompt_tuning_init_labels": ["a", " "]}, "label ' ' has no"),
    ({"prompt_tuning_init": "LABELS", "prompt_tuning_init_labels": ["a"] * 9},
     "holds 9 labels, and there are 3 virtual tokens; give num_virtual_tokens=9"),
    ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a",
      "tokenizer_kwargs": {"trust_remote_code": True}}, "a config never runs code"),
    ({"token_dim": 30}, "token_dim=30, and .* gives 32 numbers for a token; leave token_dim out"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "text"), BUILT)
def test_what_a_start_refuses(options: dict[str, Any], text: str, tokenizer: str) -> None:
    options = {"num_virtual_tokens": 3, "tokenizer_name_or_path": tokenizer, **options}
    with pytest.raises(ValueError, match=text):
        start(**options)


def test_a_vocabulary_is_needed_and_the_right_tokenizer(tokenizer: str) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 4)
            self.config = {"model_type": "custom"}

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    sizes: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 1, "num_virtual_tokens": 2}
    options: dict[str, Any] = {"tokenizer_name_or_path": tokenizer, "prompt_tuning_init": "TEXT"}
    config = PromptTuningConfig(prompt_tuning_init_text="very good", **options, **sizes)
    with pytest.raises(ValueError, match="token 9 is not in the model's vocabulary of 3 tokens"):
        get_peft_model(Sums(), config)
    model = Sums()
    model.embed = nn.Linear(3, 4)  # type: ignore[assignment]
    config = PromptTuningConfig(
        prompt_tuning_init="SAMPLE_VOCAB", target_modules=["embed"], token_dim=4, **sizes
    )
    with pytest.raises(ValueError, match=r"takes rows of a vocabulary, .* Linear; use 'RANDOM'"):
        get_peft_model(model, config)


def test_what_a_call_of_several_tasks_refuses(tmp_path: Path) -> None:
    method = METHODS["tasks"]
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **method.options)
    model, given = get_peft_model(build("llama", "CAUSAL_LM"), config), batch("CAUSAL_LM")
    for tasks, text in [
        ({}, r"multitask prompt tuning needs task_ids, one for each row: model\(..., task_ids="),
        ({"task_ids": torch.tensor([0, 3])}, "task_ids holds 3; there are 3 tasks"),
        ({"task_ids": torch.tensor([0, 1, 0])}, "task_ids has 3 entries for 2 rows"),
    ]:
        with pytest.raises(StateError, match=text):
            model(**given, **tasks)
    one = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(build("llama", "CAUSAL_LM"), one)(**given)  # there is but one task
    wrong: dict[str, Any]
    for wrong, text in [
        ({"num_ranks": 3}, "prefix_task_cols is .* num_virtual_tokens, num_ranks and the model"),
        ({"prompt_tuning_init_task": 5}, "prompt_tuning_init_task=5; .* has the tasks 0 to 2"),
    ]:
        with pytest.raises(ValueError, match=text):
            source(model, {**method.options, "num_tasks": 1, **wrong}, tmp_path)


def source(model: Any, options: dict[str, Any], folder: Path) -> Any:
    """A prompt that starts at one task of another."""
    model.save_pretrained(folder)
    options = {"prompt_tuning_init": "EXACT_SOURCE_TASK", **options}
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", prompt_tuning_init_state_dict_path=str(folder), **options
    )
    return get_peft_model(build("llama", "CAUSAL_LM"), config)


# -- the engine's own


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_with_checkpointing_are_those_without(name: str, reentrant: bool) -> None:
    method, found = METHODS[name], []
    for on in (False, True):
        base = build("llama", "CAUSAL_LM")
        torch.manual_seed(3)
        model = get_peft_model(
            base, getattr(graftwork, method.kind)(task_type="CAUSAL_LM", **method.options)
        )
        if on:
            enable_checkpointing(base, {"use_reentrant": reentrant})
            base.enable_input_require_grads()
        torch.manual_seed(8)
        model.train()(**batch("CAUSAL_LM"), **method.call, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert found[0]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@torch.no_grad()
def test_they_come_and_go(tmp_path: Path) -> None:
    model, given = several("llama", "CAUSAL_LM"), batch("CAUSAL_LM")
    base = build("llama", "CAUSAL_LM").eval()(**given).logits
    with model.disable_adapter():
        assert torch.equal(model(**given).logits, base)
    assert "cpt" in str(model.adapters())
    model.set_adapter("cpt")
    want = model(**given).logits
    model.base_model.rename_adapter("cpt", "new")
    model.delete_adapter(["tasks", "more", "mlp", "lora"])
    assert torch.equal(model(**given).logits, want)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it adds tokens to the input, which no weight holds"):
        model.merge_adapter()
    plain = model.unload()
    assert torch.equal(plain(**given).logits, base)
    assert not any(type(h).__name__ == "Entry" for h in plain._forward_pre_hooks.values())
    model = get_peft_model(base := build("llama", "CAUSAL_LM"), LoraConfig(), "lora")
    model.load_adapter(tmp_path / "new", "again")
    model.base_model.set_adapter(["again", "lora"])  # a LoRA starts as nothing
    torch.testing.assert_close(model.eval()(**given).logits, want, **CLOSE)
