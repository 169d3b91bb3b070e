"""What virtual tokens are near to, against products over the whole vocabulary; and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cosine_similarity

import graftwork
from graftwork import (
    AdaptionPromptConfig,
    CartridgeConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    StateError,
    TrainableTokensConfig,
    get_peft_model,
    nearest_tokens,
    prompt_norms,
)
from graftwork.prompts import nearest

from .families import FAMILIES
from .rows import METHODS, build

TASK = "CAUSAL_LM"


def attached(name: str, task: str = TASK, family: str = "llama") -> Any:
    method = METHODS[name]
    torch.manual_seed(5)
    config = getattr(graftwork, method.kind)(task_type=task, **method.options)
    return get_peft_model(build(family, task), config).eval()


def vocabulary(model: Any) -> torch.Tensor:
    return model.get_base_model().get_input_embeddings().base_layer.weight


def check(found: Any, rows: torch.Tensor, table: torch.Tensor, k: int) -> None:
    """Against all cosines at once."""
    every = cosine_similarity(rows[:, None], table[None], dim=-1)
    values, ids = every.topk(k)
    assert [one.norm for one in found] == pytest.approx(rows.norm(dim=1).tolist())
    assert [[near.id for near in one.nearest] for one in found] == ids.tolist()
    assert torch.tensor(
        [[near.similarity for near in one.nearest] for one in found]
    ).allclose(values, atol=1e-6)  # fmt: skip
    assert found.vocabulary_norm == pytest.approx(table.norm(dim=1).median().item())


@pytest.mark.parametrize("name", ["prompt", "sampled", "mlp", "lstm", "cpt"])
def test_the_nearest_tokens_are_those_of_the_greatest_cosine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    rows = model.base_model.switch.shared["default"].rows({}, 1)[0].detach()
    monkeypatch.setattr(nearest, "CHUNK", 7)  # the last one is not full
    check(nearest_tokens(model, k=3), rows, vocabulary(model), 3)
    assert {near.text for one in nearest_tokens(model) for near in one.nearest} == {None}


def test_a_copied_token_is_nearest_to_itself_and_its_length_is_told() -> None:
    model = attached("prompt")
    with torch.no_grad():
        model.base_model.switch.shared["default"].E[2] = 8 * vocabulary(model)[17]
    one = nearest_tokens(model, k=1)[2]
    assert (one.place, one.task, one.part, one.nearest[0].id) == (2, None, "", 17)
    assert one.nearest[0].similarity == pytest.approx(1)
    assert one.norm == pytest.approx(8 * vocabulary(model)[17].norm().item())


def test_each_task_has_rows_of_its_own() -> None:
    model = attached("tasks")
    shared = model.base_model.switch.shared["default"]
    found = nearest_tokens(model)
    assert [(one.task, one.place) for one in found] == [(t, i) for t in range(3) for i in range(5)]
    rows = shared.rows({"task_ids": torch.arange(3)}, 3).detach()
    check(found, rows.flatten(0, 1), vocabulary(model), 5)
    last = nearest_tokens(model, task_ids=[2])
    assert [(one.task, one.place) for one in last] == [(2, i) for i in range(5)]
    check(last, rows[2], vocabulary(model), 5)  # not the same bits: another shape of product
    assert "task 1   0  norm" in str(found)
    with pytest.raises(ValueError, match="there is no task 3; there are 0 to 2"):
        nearest_tokens(model, task_ids=[3])


@pytest.mark.parametrize(
    ("name", "parts"), [("prompt", ["encoder"]), ("tasks", ["encoder", "decoder"])]
)
def test_of_an_encoder_decoder_the_first_half_is_the_encoders(name: str, parts: list[str]) -> None:
    model = attached(name, "SEQ_2_SEQ_LM", "t5")
    found = nearest_tokens(model, task_ids=[1] if name == "tasks" else None)
    assert [one.part for one in found] == [part for part in parts for _ in range(5)]
    shared = model.base_model.switch.shared["default"]
    context = {"task_ids": torch.tensor([1])}
    rows = [shared.tokens(context, 1, decoder)[0] for decoder in (False, True)[: len(parts)]]
    check(found, torch.cat(rows).detach(), vocabulary(model), 5)


def test_it_is_the_base_models_vocabulary_and_the_active_prompt() -> None:
    model = attached("prompt")
    plain = nearest_tokens(model)
    model.add_adapter("rows", TrainableTokensConfig(token_indices=list(range(64))))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rows" in name:
                p.normal_()
    model.set_adapter(["rows", "default"])
    assert nearest_tokens(model) == plain


def test_what_holds_no_embeddings_says_what_can_be_shown() -> None:
    model = get_peft_model(build("llama", TASK), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(StateError, match=r"is a LORA adapter, .*this model has no prompt"):
        nearest_tokens(model)
    model.add_adapter("soft", PromptTuningConfig(num_virtual_tokens=2))
    model.add_adapter("keys", PrefixTuningConfig(num_virtual_tokens=2))
    model.add_adapter("gated", AdaptionPromptConfig())
    with pytest.raises(StateError, match=r"this model are \['soft', 'keys', 'gated'\]"):
        nearest_tokens(model)
    with pytest.raises(StateError, match=r"keys and values of single .*graftwork.prompt_norms"):
        nearest_tokens(model, "keys")
    with pytest.raises(StateError, match=r"prompts of single .*graftwork.prompt_norms"):
        nearest_tokens(model, "gated")
    with pytest.raises(StateError, match=r"nothing for single .*use graftwork.nearest_tokens"):
        prompt_norms(model, "soft")
    with pytest.raises(StateError, match=r"is a LORA .*prompts of this model are"):
        prompt_norms(model)
    with pytest.raises(StateError, match="'sof'"):
        nearest_tokens(model, "sof")
    assert len(nearest_tokens(model, "soft")) == 2


def test_wrong_numbers_and_other_inputs_are_refused() -> None:
    model = attached("prompt")
    with pytest.raises(ValueError, match="k=0 is how many tokens"):
        nearest_tokens(model, k=0)
    with pytest.raises(ValueError, match="task_ids is of multitask prompt tuning, not of PROMPT_T"):
        nearest_tokens(model, task_ids=[0])
    assert len(nearest_tokens(model, k=1000)[0].nearest) == 64  # the whole vocabulary
    model.base_model.switch.activate(())
    with pytest.raises(StateError, match=r"no adapter is active; give adapter_name, one of \['de"):
        nearest_tokens(model)
    picture = get_peft_model(FAMILIES["vit"].build(), PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="stand among patches"):
        nearest_tokens(picture)


def test_the_norms_of_keys_and_values() -> None:
    for config in (PrefixTuningConfig, CartridgeConfig):
        model = get_peft_model(build("llama", TASK), config(num_virtual_tokens=3, task_type=TASK))
        table = model.base_model.switch.shared["default"]
        found = prompt_norms(model)
        assert [one.layer for one in found] == ["0", "1"]
        for i, one in enumerate(found):
            pairs = zip(("keys", "values"), table.rows(i), strict=True)
            wanted = {name: t.transpose(0, 1).flatten(1).norm(dim=1).mean() for name, t in pairs}
            assert one.norms == pytest.approx({k: v.item() for k, v in wanted.items()})


def test_the_norms_and_gates_of_an_adaption_prompt() -> None:
    model = get_peft_model(build("llama", TASK), AdaptionPromptConfig(adapter_layers=2))
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in state.items():
            p.fill_(0.5 if name.endswith("g") else 2.0)
    found = prompt_norms(model)
    assert [one.layer for one in found] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert found[1].norms == pytest.approx({"prompt": 2 * 32**0.5, "gate": 0.5})


def fast(inner: Any, decoder: Any, **named: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(inner)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def test_tokens_are_shown_as_they_stand_in_a_text() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*letters, "Ġgood"])}
    of_bytes = fast(models.BPE(words, []), decoders.ByteLevel(), eos_token="<end>")
    shown = lambda word: nearest.text_of(of_bytes, of_bytes.convert_tokens_to_ids(word))  # noqa: E731
    assert [shown(w) for w in ("Ġgood", "Ċ", "A", "<end>")] == [" good", "\n", "A", "<end>"]
    assert shown("Ģ") is None and nearest.text_of(of_bytes, 9999) is None  # half a character; none
    of_pieces = fast(
        models.Unigram([("<unk>", 0.0), ("▁good", -1.0), ("od", -1.0), ("<0xE4>", -2.0)], 0, True),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    assert [nearest.text_of(of_pieces, i) for i in (1, 2, 3)] == [" good", "od", "<0xE4>"]
    assert str(nearest.Neighbour(3, " good", 0.5)) == "' good' 0.50"
    assert str(nearest.Neighbour(3, None, -0.25)) == "#3 -0.25"
