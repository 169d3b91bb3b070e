"""The laws of prompts, for every family of models: a row computes as alone, whatever stands beside
it in the batch; step by step as at once; in checkpoints as without.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    TargetError,
    get_peft_model,
)
from prompts.families import DECODERS, FAMILIES, TOKENS, VOCAB, WRITERS, inputs, result

METHODS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig, "deep": PTuningV2Config}
NOWHERE = ("whisper", "wav2vec2", "clip_text")  # a prompt in front of their input has no place
LORA = r".*\.(value|in_proj|value_proj|Wqkv|c_attn|v_proj|v)"
LONG = (1, 50, 3, 20, 7, 33, 12, 2)
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def cases(families: Any) -> list[Any]:
    """Each of these families with each method that it can have."""
    return [
        pytest.param(family, method, id=f"{family}-{method}")
        for family in families
        for method in METHODS
        if method != "prompt" or family not in NOWHERE
    ]


def config(family: str, method: str, n: int) -> Any:
    return METHODS[method](task_type=FAMILIES[family].task, num_virtual_tokens=n)


@functools.lru_cache(4)
def made(family: str, method: str) -> PeftModel:
    """A model with two prompts and a LoRA, which must not be changed."""
    torch.manual_seed(3)
    model = get_peft_model(FAMILIES[family].build(), config(family, method, 3), "a")
    model.add_adapter("b", config(family, method, 7))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=LORA, init_lora_weights=False))
    return model.eval()


@torch.no_grad()
def run(model: PeftModel, x: dict[str, Tensor], *names: str, **options: Any) -> Tensor:
    """The result with these adapters, or with those that are active."""
    if not names:
        return result(model(**x, **options))
    with model.base_model.using(*(name for name in names if name != "__base__")):
        return result(model(**x, **options))


def row(x: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: value[i : i + 1] for name, value in x.items()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def tail(family: str, y: Tensor, own: int) -> Tensor:
    """The places of an output that an input without prompts has too; ``own``: of virtual ones."""
    if FAMILIES[family].kind == "picture":
        return torch.cat([y[:, :1], y[:, 1 + own :]], dim=1)
    return y[:, own:]


def added(family: str, method: str, n: int) -> int:
    """How many places more an output has."""
    return n if method == "prompt" and FAMILIES[family].kind != "both" else 0


@pytest.mark.fault("G4")
@pytest.mark.parametrize(("family", "method"), cases(FAMILIES))
def test_rows_of_a_mixed_batch_are_as_alone(family: str, method: str) -> None:
    model, x = made(family, method), inputs(family)
    names = ["a", "b", "__base__", "lora"]
    n = added(family, method, 7)
    y = tail(family, run(model, x, adapter_names=names), n)
    lengths = {"a": 3, "b": 7}
    for i, name in enumerate(names):
        alone = run(model, row(x, i), name)
        close(y[i : i + 1], tail(family, alone, added(family, method, lengths.get(name, 0))))
    base = FAMILIES[family].build()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(result(model(**x)), result(base(**x)))
    assert not torch.allclose(tail(family, run(model, x, "a"), added(family, method, 3)),
                              result(base(**x)), atol=1e-4)  # fmt: skip


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [0] * 4 + [1] * 5],
    "right": [[1] * 6 + [0] * 3, [1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]],
    "mixed": [[0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 7 + [0] * 2, [0] * 3 + [1] * 6, [1] * 9],
}


@pytest.mark.fault("G3")
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("family", "method"), cases(TOKENS))
def test_a_padded_row_is_as_alone(family: str, method: str, side: str) -> None:
    model, x, mask = made(family, method), inputs(family), torch.tensor(MASKS[side])
    for names in (["a"] * 4, ["b", "a", "__base__", "lora"]):
        y = run(model, x, attention_mask=mask, adapter_names=names)
        for i, name in enumerate(names):
            keep = mask[i].bool()
            alone = {**row(x, i), "input_ids": x["input_ids"][i : i + 1, keep]}
            expected = run(model, alone, name)
            if FAMILIES[family].kind == "both":
                close(y[i : i + 1], expected)
                continue
            n, own = y.shape[1] - 9, expected.shape[1] - int(keep.sum())
            pads = int((mask[i].cumsum(0) == 0).sum())  # in front of the virtual tokens
            at = [j if j < pads else j + n for j in keep.nonzero()[:, 0].tolist()]
            close(y[i, at], expected[0, own:])


@pytest.mark.fault("G3")
@pytest.mark.parametrize(("family", "method"), cases(WRITERS))
def test_step_by_step_is_as_at_once(family: str, method: str) -> None:
    model, x, mask = made(family, method), inputs(family), torch.tensor(MASKS["left"])
    names, options = ["a", "b", "__base__", "lora"], {**GENERATE, "adapter_names": None}
    given = {"input_ids": x["input_ids"], "attention_mask": mask}
    out = {"output_logits": True, "return_dict_in_generate": True, "adapter_names": names}
    with torch.no_grad():
        made_up = model.generate(**given, **{**options, **out})
    steps, two = torch.stack(made_up.logits, dim=1), FAMILIES[family].kind == "both"
    ids = made_up.sequences
    if two:
        y = run(model, {**given, "decoder_input_ids": ids}, adapter_names=names)
    else:
        longer = torch.cat([mask, mask.new_ones(4, 6)], dim=1)
        y = run(model, {"input_ids": ids, "attention_mask": longer}, adapter_names=names)
    close(y[:, -7:-1], steps)
    for i, name in enumerate(names):
        keep = mask[i].bool()
        with torch.no_grad(), model.base_model.using(*([name] if name != "__base__" else [])):
            one = model.generate(input_ids=x["input_ids"][i : i + 1, keep], **options)
        assert torch.equal(one[0, -6:], ids[i, -6:])


@pytest.mark.parametrize("family", ["whisper"])
@pytest.mark.parametrize("method", ["prefix", "deep"])
def test_speech_is_written_step_by_step_as_at_once(family: str, method: str) -> None:
    model, x = made(family, method), inputs(family)
    names, cache, steps = ["a", "b", "__base__", "lora"], None, []
    whole = run(model, x, adapter_names=names)
    key = "cache" if "cache" in _known(model.get_base_model()) else "past_key_values"
    for i in range(9):
        one = {**x, "decoder_input_ids": x["decoder_input_ids"][:, i : i + 1]}
        with torch.no_grad():
            out = model(**one, use_cache=True, adapter_names=names, **{key: cache})
        cache = out[key]
        steps.append(out.logits)
    close(torch.cat(steps, dim=1), whole)


def _known(model: nn.Module) -> Any:
    import inspect

    return inspect.signature(model.forward).parameters


@pytest.mark.fault("G2")
@pytest.mark.parametrize(("family", "method"), cases(FAMILIES))
def test_gradients_with_checkpoints_are_those_without(family: str, method: str) -> None:
    found, x = [], inputs(family, rows=2)
    options = {"prefix_projection": True} if method == "deep" else {}
    shares = family in ("gemma3n", "gemma4")  # keys and values across layers
    more = {"use_cache": False} if shares else {}  # in which older ones do it alone
    kinds = (None, False) if shares else (None, True, False)  # reentrant ones cut there
    for reentrant in kinds:
        torch.manual_seed(5)
        task = FAMILIES[family].task
        own = METHODS[method](task_type=task, num_virtual_tokens=3, **options)
        model = get_peft_model(FAMILIES[family].build(), own).train()
        if reentrant is not None:
            how = {"use_reentrant": reentrant}
            base: Any = model.get_base_model()
            name = "activation_checkpointing_enable"  # its name in newer transformers
            getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")(how)
            if family != "wav2vec2":  # whose inputs are not embedded
                base.enable_input_require_grads()
        y = result(model(**x, **more))
        if reentrant and not y.requires_grad:
            pytest.skip("its inputs take no gradient")
        y.pow(3).mean().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    size = found[0].abs().max()
    assert size > 0
    for other in found[1:]:
        torch.testing.assert_close(other / size, found[0] / size, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "method"), cases([f for f in TOKENS if f != "clip_text"]))
def test_what_a_user_gives_is_kept(family: str, method: str) -> None:
    model, x = made(family, method), inputs(family)
    base: Any = model.get_base_model()
    y, known = run(model, x), _known(base)
    embeds = base.get_input_embeddings()(x["input_ids"]).detach()
    if family not in ("gemma3n", "gemma4"):  # which look for the ids in other tables
        close(run(model, {**{k: v for k, v in x.items() if k != "input_ids"},
                          "inputs_embeds": embeds}), y)  # fmt: skip
    if "position_ids" in known:
        first = 1 if family == "roberta" else 0  # behind the padding's position
        places = torch.arange(first, first + 9)[None].expand(4, -1)
        close(run(model, x, position_ids=places), y)
        assert not torch.allclose(run(model, x, position_ids=places * 2), y, atol=1e-6)
    if "token_type_ids" in known:
        kinds = torch.zeros_like(x["input_ids"])
        other = run(model, x, token_type_ids=kinds)
        if family == "gpt2":  # whose types are rows of the tokens' table
            close(other[:1], run(model, row(x, 0), token_type_ids=kinds[:1]))
        else:
            close(other, y)


@pytest.mark.parametrize(("family", "method"), cases(WRITERS))
def test_beams_and_samples(family: str, method: str) -> None:
    model, x, mask = made(family, method), inputs(family), torch.tensor(MASKS["left"])
    names = ["a", "b", "__base__", "lora"]
    given = {"input_ids": x["input_ids"], "attention_mask": mask}
    beams = {**GENERATE, "num_beams": 3}
    with torch.no_grad():
        out = model.generate(**given, **beams, adapter_names=names)
        for i, name in enumerate(names):
            keep = mask[i].bool()
            with model.base_model.using(*([name] if name != "__base__" else [])):
                one = model.generate(input_ids=x["input_ids"][i : i + 1, keep], **beams)
            assert torch.equal(one[0, -6:], out[i, -6:])
        torch.manual_seed(0)
        drawn = model.generate(**given, **{**GENERATE, "do_sample": True}, adapter_names=names)
    assert drawn.shape[0] == 4 and int(drawn.max()) < VOCAB


@pytest.mark.parametrize(("family", "method"), cases([f for f in TOKENS if f != "clip_text"]))
def test_eight_rows_with_eight_prompts(family: str, method: str) -> None:
    torch.manual_seed(4)
    model = get_peft_model(FAMILIES[family].build(), config(family, method, LONG[0]), "p0").eval()
    names = [f"p{i}" for i in range(8)]
    for i in range(1, 8):
        model.add_adapter(names[i], config(family, method, LONG[i]))
    x = inputs(family, rows=8, length=6)
    mask = torch.ones_like(x["input_ids"])
    mask[1, :2] = mask[4, :3] = 0
    y = run(model, x, attention_mask=mask, adapter_names=names)
    writes = family in WRITERS
    given = {"input_ids": x["input_ids"], "attention_mask": mask}
    out = {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        all_ = model.generate(**given, **GENERATE, **out, adapter_names=names) if writes else None
    for i, name in enumerate(names):
        alone = {**row(x, i), "input_ids": x["input_ids"][i : i + 1, mask[i].bool()]}
        expected = run(model, alone, name)
        t = alone["input_ids"].shape[1] if FAMILIES[family].kind != "both" else expected.shape[1]
        close(y[i : i + 1, -t:], expected[:, -t:])
        if all_ is not None:
            with torch.no_grad(), model.base_model.using(name):
                one = model.generate(input_ids=alone["input_ids"], **GENERATE, **out)
            close(torch.stack(all_.logits)[:, i], torch.stack(one.logits)[:, 0])


@pytest.mark.parametrize("family", NOWHERE)
def test_where_rows_in_front_have_no_place(family: str) -> None:
    why = {"clip_text": "takes no embeddings", "whisper": "reads input_features"}
    with pytest.raises(TargetError, match=why.get(family, "reads input_values")) as error:
        get_peft_model(FAMILIES[family].build(), PromptTuningConfig(num_virtual_tokens=3))
    assert "use prefix tuning" in str(error.value) and "PrefixTuningConfig" in str(error.value)


IMPLEMENTATIONS = {
    "eager": ["bert", "gpt2", "llama", "mistral", "gemma3", "gemma4", "t5", "bart", "whisper",
              "wav2vec2", "vit", "clip_vision", "modernbert"],
    "flex_attention": ["bert", "llama", "mistral", "gemma3", "gemma4", "modernbert"],
}  # fmt: skip


@pytest.mark.fault("G1")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch's own code
@pytest.mark.parametrize(
    ("attention", "family"), [(a, f) for a, names in IMPLEMENTATIONS.items() for f in names]
)
def test_every_attention_is_the_same(attention: str, family: str) -> None:
    x, masks, found = inputs(family), {}, []
    if family in TOKENS:
        masks = {"attention_mask": torch.tensor(MASKS["mixed"])}
    for kind in ("sdpa", attention):
        torch.manual_seed(3)
        model = get_peft_model(_build(family, kind), config(family, "deep", 3), "a").eval()
        model.add_adapter("b", config(family, "deep", 7))
        names = ["a", "b", "__base__", "a"]
        with torch.compiler.set_stance("force_eager"):
            found.append([run(model, x, **masks), run(model, x, **masks, adapter_names=names)])
            if family in DECODERS:
                ids, mask = x["input_ids"], torch.tensor(MASKS["left"])
                given = {"input_ids": ids, "attention_mask": mask, "adapter_names": names}
                with torch.no_grad():
                    found[-1].append(model.generate(**given, **GENERATE))
    keep = masks.get("attention_mask")
    for plain, other in zip(*found, strict=True):
        if keep is None or FAMILIES[family].kind == "both" or not plain.is_floating_point():
            close(plain, other)
        else:
            close(plain[keep.bool()], other[keep.bool()])


def _build(family: str, attention: str) -> nn.Module:
    try:
        return FAMILIES[family].build(attn_implementation=attention)
    except ValueError as error:
        pytest.skip(str(error))


def test_pictures_see_rows_between_the_class_and_the_patches() -> None:
    for family, leaf in (("vit", "cls_token"), ("clip_vision", "class_embedding")):
        model = made(family, "prompt")
        base: Any = model.get_base_model()
        stage = next(m for m in base.modules() if leaf in m._parameters)
        seen: list[Tensor] = []
        host = next(h for h in model.base_model.hosts().values() if h.base_layer is stage)
        handle = host.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        x = inputs(family)
        run(model, x, "a")
        handle.remove()
        plain = stage(x["pixel_values"])
        rows = model.base_model.switch.shared["a"].E
        close(seen[0], torch.cat([plain[:, :1], rows.expand(4, -1, -1), plain[:, 1:]], dim=1))
