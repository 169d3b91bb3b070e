"""Keys and values in front: as PEFT's where PEFT has them, as computed by hand where it has not."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import (
    CartridgeConfig,
    FileError,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    StateError,
    TargetError,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from graftwork.errors import POLICY, MergeError, PeftWarning
from graftwork.prompts.attention import acting, install
from graftwork.prompts.masks import View, kind_of
from graftwork.prompts.own import OWN, place
from prompts.families import DECODERS, FAMILIES, inputs, result

pytestmark = [  # of PEFT's and torch's code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BOTH = [*DECODERS, "t5", "bart"]  # what PEFT puts a prefix into
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "projection": {"prefix_projection": True, "encoder_hidden_size": 12},
    "zero": {"init_weights": "zero"},
    "zero_projection": {"init_weights": "zero", "prefix_projection": True},
}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def table(model: PeftModel, name: str = "default") -> Any:
    return model.base_model.switch.shared[name]


@torch.no_grad()
def run(model: Any, family: str, **options: Any) -> Tensor:
    return result(model(**inputs(family), **options))


# -- PEFT


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers")
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("family", BOTH)
def test_peft_starts_alike_and_both_read_both(
    peft: Any, family: str, fields: str, tmp_path: Path
) -> None:
    f, options = FAMILIES[family], FIELDS[fields]
    options = {**options, "task_type": f.task, "num_virtual_tokens": 5}
    bases = [f.build() for _ in range(4)]
    torch.manual_seed(0)
    ours = get_peft_model(bases[0], PrefixTuningConfig(**options)).eval()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(bases[1], peft.PrefixTuningConfig(**options)).eval()
    y = run(ours, family)
    close(y, run(theirs, family))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    close(run(peft.PeftModel.from_pretrained(bases[2], tmp_path / "ours").eval(), family), y)
    close(run(PeftModel.from_pretrained(bases[3], tmp_path / "theirs").eval(), family), y)
    paths = [tmp_path / who / "adapter_config.json" for who in ("ours", "theirs")]
    mine, other = (json.loads(path.read_text()) for path in paths)
    assert mine == {**other, "base_model_name_or_path": ""}


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True}])
def test_a_small_start_is_near_zero_and_lets_virtual_tokens_differ(
    peft: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    made, learnt = {}, {}
    for start in (None, "small", "zero"):
        torch.manual_seed(0)
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights=start, **options
        )
        model = get_peft_model(FAMILIES["llama"].build(), config)
        made[start] = table(model).whole().detach().clone()
        for _ in range(2):
            y = result(model(**inputs("llama")))
            y.square().sum().backward()
            with torch.no_grad():
                for p in table(model).parameters():
                    p -= 0.1 * p.grad if p.grad is not None else 0
                    p.grad = None
        learnt[start] = table(model).whole().detach()
    close(made["small"], 0.02 * made[None])
    assert not made["zero"].any()
    if not options:
        close(learnt["zero"], learnt["zero"][:1].expand(4, -1))  # four copies of one token
    assert (learnt["small"] - learnt["small"][:1]).abs().max() > 1e-3
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights="small")
    ours = get_peft_model(FAMILIES["llama"].build(), config).eval()
    ours.save_pretrained(tmp_path)
    close(run(peft.PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path).eval(), "llama"),
          run(ours, "llama"))  # fmt: skip


def test_the_report_says_that_it_trains() -> None:
    model = get_peft_model(FAMILIES["llama"].build(), PrefixTuningConfig(task_type="CAUSAL_LM"))
    assert all(row.trainable and row.active for row in model.adapters())
    model.add_adapter("other", PrefixTuningConfig(task_type="CAUSAL_LM"))
    assert not any(row.trainable for row in model.adapters() if row.adapter == "other")


@pytest.mark.parametrize("first", ["sliding_attention", "full_attention"])
def test_peft_leaves_out_what_does_not_fit(peft: Any, first: str, tmp_path: Path) -> None:
    """Gemma 4 with fewer, larger heads in its global layers."""
    fields = {**FAMILIES["gemma4"].fields, "num_global_key_value_heads": 1}
    fields |= {"attention_k_eq_v": True, "num_kv_shared_layers": 0}
    fields["layer_types"] = [first, *fields["layer_types"][1:]]
    left = fields["layer_types"].count("sliding_attention")
    family = type(FAMILIES["gemma4"])("Gemma4ForCausalLM", "Gemma4TextConfig", fields, "decoder")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.warns(PeftWarning, match=rf"1 heads of 16 do not fit {left} of 6 attentions"):
        ours = get_peft_model(family.build(), config).eval()
    assert len(ours.base_model.hosts()) == 6 - left
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(family.build(), tmp_path).eval()
    with pytest.warns(UserWarning, match="skipped"):
        y = run(theirs, "gemma4")
    close(run(ours, "gemma4"), y)


@pytest.mark.parametrize("kind", ["cartridge", "prefix"])
def test_peft_takes_the_keys_of_a_text_alike(peft: Any, kind: str, tmp_path: Path) -> None:
    config, other = {
        "cartridge": (CartridgeConfig, peft.CartridgeConfig),
        "prefix": (PrefixTuningConfig, peft.PrefixTuningConfig),
    }[kind]
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    options |= {"num_frozen_tokens": 2} if kind == "cartridge" else {}
    f, ids = FAMILIES["llama"], inputs("llama", rows=1)["input_ids"]
    torch.manual_seed(0)
    ours = get_peft_model(f.build(), config(**options)).eval()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(f.build(), other(**options)).eval()
    close(run(ours, "llama"), run(theirs, "llama"))
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        cache = f.build()(input_ids=ids, use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    taken = initialize_kv_prefix_from_past_key_values(ours, past_key_values=cache)
    peft.initialize_kv_prefix_from_past_key_values(theirs, past_key_values=layers)
    assert torch.equal(taken, table(ours).whole())
    close(run(ours, "llama"), run(theirs, "llama"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    read = PeftModel.from_pretrained(f.build(), tmp_path / "theirs").eval()
    close(run(read, "llama"), run(theirs, "llama"))
    again = peft.PeftModel.from_pretrained(f.build(), tmp_path / "ours").eval()
    close(run(again, "llama"), run(ours, "llama"))


def test_peft_composes_cartridges_alike(peft: Any, tmp_path: Path) -> None:
    f = FAMILIES["llama"]
    for i, n in enumerate((3, 5)):
        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, num_frozen_tokens=i)
        get_peft_model(f.build(), config).save_pretrained(tmp_path / str(i))
    paths = [tmp_path / "0", tmp_path / "1"]
    compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    peft.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    ours = PeftModel.from_pretrained(f.build(), tmp_path / "ours").eval()
    theirs = peft.PeftModel.from_pretrained(f.build(), tmp_path / "theirs").eval()
    close(run(ours, "llama"), run(theirs, "llama"))
    assert ours.peft_config["default"].num_virtual_tokens == 8  # type: ignore[attr-defined]
    both = PeftModel.from_pretrained(f.build(), tmp_path / "0", "a").eval()
    both.load_adapter(tmp_path / "1", "b")
    both.set_adapter(["a", "b"])  # the same as one behind the other
    close(run(both, "llama"), run(ours, "llama"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_peft_reads_p_tuning_v2(peft: Any, family: str, tmp_path: Path) -> None:
    f = FAMILIES[family]
    config = PTuningV2Config(task_type=f.task, num_virtual_tokens=4)
    ours = get_peft_model(f.build(), config).eval()
    ours.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "P_TUNING_V2"
    read = PeftModel.from_pretrained(f.build(), tmp_path / "ours").eval()
    assert isinstance(read.peft_config["default"], PTuningV2Config)
    close(run(read, family), run(ours, family))
    ours.save_pretrained(tmp_path / "peft", compat="peft")
    theirs = peft.PeftModel.from_pretrained(f.build(), tmp_path / "peft").eval()
    assert theirs.peft_config["default"].peft_type == "PREFIX_TUNING"
    close(run(theirs, family), run(ours, family))
    again = PeftModel.from_pretrained(f.build(), tmp_path / "peft").eval()
    close(run(again, family), run(ours, family))


def test_what_cannot_be_written_for_peft(tmp_path: Path) -> None:
    f = FAMILIES["t5"]
    deep = PTuningV2Config(task_type=f.task, num_virtual_tokens=4)
    model = get_peft_model(f.build(), PrefixTuningConfig(task_type=f.task), "first")
    model.add_adapter("deep", deep)
    with pytest.raises(ValueError, match="nothing into the encoder of an encoder-decoder"):
        model.save_pretrained(tmp_path, compat="peft")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, selected_adapters=["first"], compat="peft")
    with pytest.raises(ValueError, match="compat='hf' is not known; it is 'peft'"):
        model.save_pretrained(tmp_path, compat="hf")
    from graftwork import BottleneckConfig

    other = get_peft_model(FAMILIES["llama"].build(), BottleneckConfig())
    with pytest.raises(ValueError, match="PEFT has no method BOTTLENECK and none that does the"):
        other.save_pretrained(tmp_path, compat="peft")


def test_peft_refuses_what_works_here(peft: Any) -> None:
    """PEFT's prefix needs a cache, which no encoder of transformers 5.24 takes by PEFT's name."""
    import transformers

    config = transformers.BertConfig(**FAMILIES["bert"].fields, num_labels=3)
    theirs = peft.get_peft_model(
        transformers.BertForSequenceClassification(config),
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    )
    with pytest.raises(ValueError, match="does not support past key values"):
        theirs(**inputs("bert"))
    ours = get_peft_model(
        transformers.BertForSequenceClassification(config),
        PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    )
    assert ours(**inputs("bert")).logits.shape == (4, 3)


# -- by hand


class Hand:
    """softmax(q [P_k; K]') [P_v; V] with loops, in place of transformers' sdpa."""

    def __init__(self, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs  # id of an attention -> keys and values, (heads, n, size)
        self.biased: Any = None

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scaling = kwargs.get("scaling") or q.shape[-1] ** -0.5
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        bias, out = kwargs.get("position_bias"), torch.empty_like(q)
        if getattr(module, "has_relative_attention_bias", False):
            self.biased = module
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                at = h * k.shape[1] // q.shape[1]
                first = self.pairs.get(id(module))
                n = 0 if first is None else first[0].shape[1]
                keys, values = k[b, at], v[b, at]
                if first is not None:
                    keys, values = (
                        torch.cat([first[0][at], keys]),
                        torch.cat([first[1][at], values]),
                    )
                scores = q[b, h] @ keys.T * scaling
                for i in range(q.shape[2]):
                    for j in range(n + k.shape[2]):
                        if bias is not None and j >= n:
                            scores[i, j] += bias[0, h, i, j - n]
                        elif bias is not None:
                            scores[i, j] += self.relative(j - n - i)[h]
                        hides = mask is not None and j >= n and not mask[b, 0, i, j - n]
                        if hides or (mask is None and causal and j - n > i):
                            scores[i, j] = -float("inf")
                out[b, h] = scores.softmax(-1) @ values
        return out.transpose(1, 2), None

    def relative(self, distance: int) -> Tensor:
        m = self.biased
        bucket = m._relative_position_bucket(
            torch.tensor(distance),
            bidirectional=not m.is_decoder,
            num_buckets=m.relative_attention_num_buckets,
            max_distance=m.relative_attention_max_distance,
        )
        found: Tensor = m.relative_attention_bias.weight[bucket]
        return found


# family -> what a user would give for positions behind n keys
HAND: dict[str, Any] = {
    "llama": lambda n: {"position_ids": torch.arange(n, n + 9)[None]},
    "bert": lambda n: {"position_ids": torch.arange(n, n + 9)[None]},
    "roberta": lambda n: {"position_ids": torch.arange(n + 1, n + 10)[None]},
    "modernbert": lambda n: {},
    "clip_text": lambda n: {},
    "clip_vision": lambda n: {},
    "vit": lambda n: {},
    "wav2vec2": lambda n: {},
    "whisper": lambda n: {"decoder_position_ids": torch.arange(n, n + 9)[None].expand(2, -1)},
    "t5": lambda n: {},
}


@pytest.mark.parametrize("family", HAND)
def test_attention_by_hand(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import AttentionInterface

    base, x = FAMILIES[family].build(), inputs(family, rows=2)
    if any(place(m) in OWN for m in base.modules()):
        pytest.skip("its attention has code of its own in this transformers")
    torch.manual_seed(0)
    config = PTuningV2Config(task_type=FAMILIES[family].task, num_virtual_tokens=4)
    model = get_peft_model(FAMILIES[family].build(), config).eval()
    with torch.no_grad():
        y = result(model(**x))
    pairs = {}
    for path, host in model.base_model.hosts().items():
        k, v = table(model).rows(host.parts_of("default")[0][1].place)
        pairs[id(base.get_submodule(path))] = (k.detach(), v.detach())
    hand = Hand(pairs)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", hand)
    with torch.no_grad():
        close(y, result(base(**x, **HAND[family](4))))


@pytest.mark.parametrize("family", ["deberta", "deberta_v2", "t5", "modernbert"])
def test_what_stands_for_code_of_its_own_does_the_same(family: str) -> None:
    base = FAMILIES[family].build()
    own = [m for m in base.modules() if place(m) in OWN and "cross" not in type(m).__name__]
    if not own:
        pytest.skip("it calls transformers' attention functions in this transformers")
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, :3] = mask[1, 6:] = 0
    seen: list[Any] = []
    for m in own:
        m.register_forward_hook(lambda *a: seen.append(a), with_kwargs=True)
    run(base, family, attention_mask=mask)
    for m, args, kwargs, out in seen:
        if kwargs.get("key_value_states") is not None or kwargs.get("past_key_values") is not None:
            continue  # of T5's decoder
        install(m)
        m._forward_hooks.clear()
        with torch.no_grad(), acting(m, lambda attend, *a, **k: attend(*a, **k)):
            again = m(*args, **kwargs)
        close(again[0], out[0])


@pytest.mark.parametrize("family", ["deberta", "deberta_v2"])
def test_disentangled_attention_by_hand(family: str) -> None:
    """q K'/sqrt(3 d) + what is between contents and positions, and q P_k'/sqrt(3 d) in front."""
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES[family].build(), PrefixTuningConfig(num_virtual_tokens=3))
    model.eval()
    host = next(iter(model.base_model.hosts().values()))
    m: Any = host.base_layer
    seen: list[Any] = []
    handle = host.register_forward_hook(lambda *a: seen.append(a[1:]), with_kwargs=True)
    run(model, family)
    handle.remove()
    args, kwargs, out = seen[0]
    names = ("hidden_states", "attention_mask", "output_attentions", "query_states",
             "relative_pos", "rel_embeddings")  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, rel, span = given["hidden_states"], given["rel_embeddings"], given["relative_pos"]

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (4, -1)).transpose(1, 2)

    with torch.no_grad():
        if family == "deberta":
            q, k, v = heads(m.in_proj(x)).chunk(3, dim=-1)
            q, v = q + heads(m.q_bias[None, None]), v + heads(m.v_bias[None, None])
            bias = m.disentangled_att_bias(q / (3 * 8) ** 0.5, k, span, rel, 3)
        else:
            q, k, v = (heads(p(x)) for p in (m.query_proj, m.key_proj, m.value_proj))
            flat = q.flatten(0, 1), k.flatten(0, 1)
            bias = m.disentangled_attention_bias(*flat, span, rel, 3).unflatten(0, (-1, 4))
        p_k, p_v = table(model).rows(0)
        y = torch.empty(4, 9, 32)
        for b in range(4):
            for h in range(4):
                content = q[b, h] @ torch.cat([p_k[h], k[b, h]]).T / (3 * 8) ** 0.5
                content[:, 3:] += bias[b, h]
                w = content.softmax(-1)
                y[b, :, 8 * h : 8 * h + 8] = w @ torch.cat([p_v[h], v[b, h]])
    close(out[0], y)


class Tokenizer:
    """One that knows one text."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, text: str, **kwargs: Any) -> dict[str, Tensor]:
        return {"input_ids": self.ids}


class Refusing(Tokenizer):
    """One whose template has no system message."""

    chat_template = "some"

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("System role not supported")


def test_a_template_without_a_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = inputs("llama")["input_ids"]
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, tokenizer = get_peft_model(FAMILIES["llama"].build(), config), Refusing(ids[:1])
    before = table(model).whole().clone()
    with pytest.raises(
        ValueError, match=r"\(System role not supported\); give use_chat_template=F"
    ):
        initialize_kv_prefix_from_text(model, tokenizer, text="a text")
    assert torch.equal(table(model).whole(), before)
    rows = initialize_kv_prefix_from_text(model, tokenizer, text="a", use_chat_template=False)
    monkeypatch.setattr(POLICY, "lenient", True)
    with pytest.warns(PeftWarning, match="as in PEFT, the text is read without it"):
        same = initialize_kv_prefix_from_text(model, tokenizer, text="a text")
    assert torch.equal(same, rows)


def test_the_keys_of_a_text_do_what_the_text_does() -> None:
    for family in ("llama", "gpt2", "qwen3", "gemma"):
        ids = inputs(family)["input_ids"]
        text, rest = ids[:1, :4], ids[1:2]
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = get_peft_model(FAMILIES[family].build(), config).eval()
        initialize_kv_prefix_from_text(model, Tokenizer(ids[:1]), text="a text")
        with torch.no_grad():
            y = model(input_ids=rest).logits
            whole = FAMILIES[family].build()(input_ids=torch.cat([text, rest], dim=1)).logits
        close(y, whole[:, 4:])


# -- what it takes, and what else is in the model


def test_the_arithmetic() -> None:
    import transformers

    config = transformers.BertConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16)
    for method in (PrefixTuningConfig, PTuningV2Config):
        with torch.device("meta"):
            base = transformers.BertModel(config)
        model = get_peft_model(base, method(num_virtual_tokens=10))
        assert model.get_nb_trainable_parameters()[0] == 10 * 24 * 2 * 1024 == 491_520


def test_of_an_encoder_decoder_the_decoder_or_both() -> None:
    for family, layers in (("t5", 4), ("bart", 3), ("whisper", 2)):
        f = FAMILIES[family]
        model = get_peft_model(f.build(), PrefixTuningConfig(task_type=f.task), "prefix")
        model.add_adapter("deep", PTuningV2Config(task_type=f.task))
        found = {name: [] for name in ("prefix", "deep")}  # type: ignore[var-annotated]
        for path, host in model.base_model.hosts().items():
            for name in host.adapters:
                found[name].append(path)
        assert len(found["prefix"]) == layers and len(found["deep"]) == 2 * layers
        assert all("decoder" in path for path in found["prefix"])
        assert table(model, "deep").E.shape == (20, 2 * layers * 2 * 32)
        assert table(model, "prefix").E.shape == (20, layers * 2 * 32)


@pytest.mark.parametrize("method", [PrefixTuningConfig, PTuningV2Config])
def test_together_with_a_lora(method: Any) -> None:
    for family in ("llama", "bert", "t5"):
        f = FAMILIES[family]
        lora = LoraConfig(r=2, target_modules=r".*(v_proj|value|\.v)", init_lora_weights=False)
        model = get_peft_model(f.build(), method(task_type=f.task, num_virtual_tokens=3), "p")
        model.add_adapter("lora", lora)
        model.set_adapter(["p", "lora"])
        y = run(model, family)
        with model.base_model.using("lora"):
            lora_alone = run(model, family)
        with model.base_model.using("p"):
            p_alone = run(model, family)
        assert not torch.allclose(y, lora_alone) and not torch.allclose(y, p_alone)
        model.set_adapter("lora")
        model.merge_adapter()
        with model.base_model.using("p", "lora"):
            close(run(model, family), y)  # the LoRA in the weights, the prefix beside them
        model.unmerge_adapter()
        model.set_adapter(["p", "lora"])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any(".p." in n for n in trained) and any(".lora." in n for n in trained)
        with pytest.raises(MergeError, match="it adds keys and values, which no weight of a layer"):
            model.merge_adapter()
        model.delete_adapter("p")
        close(run(model, family), lora_alone)
        base = model.unload()
        assert not any(type(m).__name__.endswith("Host") for m in base.modules())
        close(run(base, family), run(f.build(), family))


def test_copies_and_pickles() -> None:
    for family in ("llama", "t5", "vit", "deberta_v2"):
        f = FAMILIES[family]
        config = PTuningV2Config(task_type=f.task, num_virtual_tokens=3, prefix_projection=True)
        model = get_peft_model(f.build(), config).eval()
        y = run(model, family)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, family), y)
        with torch.no_grad():
            table(twin).E.add_(1.0)
        assert torch.equal(run(model, family), y) and not torch.allclose(run(twin, family), y)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), family), y)


@pytest.mark.parametrize("family", ["llama", "mistral", "bert", "t5", "vit", "deberta", "gemma4"])
def test_it_compiles_in_one_graph(family: str) -> None:
    config = PTuningV2Config(task_type=FAMILIES[family].task, num_virtual_tokens=3)
    model = get_peft_model(FAMILIES[family].build(), config).eval()
    y = run(model, family)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(run(compiled, family), y)
    with model.disable_adapter():
        close(run(compiled, family), run(FAMILIES[family].build(), family))


@pytest.mark.parametrize("config", [PrefixTuningConfig(), LoraConfig(init_lora_weights=False)])
def test_what_is_compiled_sees_the_first_choice_of_a_thread(config: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def choose() -> None:
        model = get_peft_model(FAMILIES["llama"].build(), config).eval()
        torch._dynamo.reset()
        compiled, y = torch.compile(model, backend="eager", fullgraph=True), run(model, "llama")
        close(run(compiled, "llama"), y)
        with model.disable_adapter():
            close(run(compiled, "llama"), run(FAMILIES["llama"].build(), "llama"))
        close(run(compiled, "llama"), y)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(choose).result()


TASKS: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "SEQ_CLS": ("bert", "BertForSequenceClassification", {"labels": torch.tensor([0, 1, 1, 0])}),
    "TOKEN_CLS": ("deberta_v2", "DebertaV2ForTokenClassification",
                  {"labels": torch.arange(36).reshape(4, 9) % 2}),
    "QUESTION_ANS": ("roberta", "RobertaForQuestionAnswering",
                     {"start_positions": torch.tensor([1, 2, 3, 4]),
                      "end_positions": torch.tensor([4, 5, 6, 7])}),
    "CAUSAL_LM": ("llama", "LlamaForCausalLM", {}),
    "SEQ_2_SEQ_LM": ("t5", "T5ForConditionalGeneration", {}),
}  # fmt: skip


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns_and_is_read_back(task: str, projection: bool, tmp_path: Path) -> None:
    family, kind, labels = TASKS[task]
    f = FAMILIES[family]
    fields = {**f.fields, "problem_type": "single_label_classification"}  # else it is found out
    f = type(f)(kind, f.config, fields if task == "SEQ_CLS" else f.fields, f.kind)
    x = inputs(family)
    labels = labels or {"labels": x.get("decoder_input_ids", x["input_ids"])}
    x = {**x, **labels}
    x.pop("decoder_input_ids", None)
    torch.manual_seed(0)
    config = PTuningV2Config(task_type=task, num_virtual_tokens=3, prefix_projection=projection)
    model = get_peft_model(f.build(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(**x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    model.eval().save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(f.build(), tmp_path).eval()
    with torch.no_grad():
        y, other = model(**x), read(**x)
    close(y.loss, other.loss)
    resumed = PeftModel.from_pretrained(f.build(), tmp_path, is_trainable=True).eval()
    assert table(resumed).projects == projection
    with torch.no_grad():
        close(resumed(**x).loss, y.loss)


def test_a_projection_is_no_part_of_a_file_of_others(tmp_path: Path) -> None:
    f = FAMILIES["llama"]
    config = PrefixTuningConfig(task_type=f.task, num_virtual_tokens=3, prefix_projection=True)
    get_peft_model(f.build(), config).save_pretrained(tmp_path)
    for extra in tmp_path.glob("training_state*"):
        extra.unlink()
    with pytest.raises((StateError, FileError), match=r"by a network|training"):
        PeftModel.from_pretrained(f.build(), tmp_path, is_trainable=True)


GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gemma4", "gpt2", "t5", "bart"])
def test_every_cache_and_none(family: str) -> None:
    import transformers

    f, ids = FAMILIES[family], inputs(family)["input_ids"]
    model = get_peft_model(f.build(), PTuningV2Config(task_type=f.task, num_virtual_tokens=4), "a")
    model.add_adapter("b", PTuningV2Config(task_type=f.task, num_virtual_tokens=9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask, **GENERATE}
    given["adapter_names"] = ["a", "b", "__base__", "b"]
    kinds: list[dict[str, Any]] = [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ]
    if not transformers.__version__.startswith("5.0."):  # which has lost it
        kinds.append({"prefill_chunk_size": 4})
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = [model.eval().generate(**given, **kind) for kind in kinds]
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_of_pictures_and_text_the_text(peft: Any, tmp_path: Path) -> None:
    import transformers as T

    text = T.Gemma3TextConfig(**FAMILIES["gemma3"].fields)
    sizes = {k: v for k, v in FAMILIES["vit"].fields.items() if k != "vocab_size"}
    config = T.Gemma3Config(text_config=text, vision_config=sizes, mm_tokens_per_image=4)
    bases = []
    for _ in range(2):
        torch.manual_seed(0)
        bases.append(T.Gemma3ForConditionalGeneration(config).eval())
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ours = get_peft_model(bases[0], prefix).eval()
    assert all("language_model" in path for path in ours.base_model.hosts())
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(bases[1], tmp_path).eval()
    close(run(ours, "gemma3"), run(theirs, "gemma3"))


@pytest.mark.parametrize("fields", [{"d_kv": 16}, {"num_decoder_layers": 2}, {"num_layers": 2}])
def test_peft_reads_unusual_encoder_decoders(peft: Any, fields: Any, tmp_path: Path) -> None:
    """Of which it makes none itself where the heads are wider, or the decoder is longer."""
    f = FAMILIES["t5"]
    f = type(f)(f.model, f.config, {"num_decoder_layers": 4, **f.fields, **fields}, f.kind)
    config = PrefixTuningConfig(task_type=f.task, num_virtual_tokens=4)
    ours = get_peft_model(f.build(), config).eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(f.build(), tmp_path).eval()
    close(run(ours, "t5"), run(theirs, "t5"))


def test_threads_do_not_see_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    f = FAMILIES["llama"]
    names = [f"p{i}" for i in range(4)]
    for i, name in enumerate(names):
        config = PrefixTuningConfig(task_type=f.task, num_virtual_tokens=i + 1)
        if i == 0:
            model = get_peft_model(f.build(), config, name).eval()
        else:
            model.add_adapter(name, config)

    def one(name: str) -> Tensor:
        with model.base_model.using(name):
            return run(model, "llama")

    alone = [one(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(one, names * 4), alone * 4, strict=True):
            assert torch.equal(found, expected)


def test_pefts_names_are_found() -> None:
    from graftwork.interop.names import MODULES, NAMES

    assert {"peft.tuners.cartridge.utils", "peft.tuners.prefix_tuning.model"} <= MODULES
    for name in (
        "PrefixTuningConfig PrefixEncoder CartridgeConfig CartridgeEncoder AdaptionPromptConfig "
        "AdaptedAttention AdaptionPromptModel PTuningV2Config compose_cartridge_adapters "
        "initialize_kv_prefix_from_text initialize_kv_prefix_from_past_key_values "
        "prompt_embeddings_from_past_key_values"
    ).split():
        where, here = NAMES[name]
        assert getattr(importlib.import_module(f"graftwork.{where}"), here).__doc__, name


# -- errors


def test_what_does_not_fit_says_so() -> None:
    llama, bert = FAMILIES["llama"], FAMILIES["bert"]
    cases: list[tuple[Any, Any, str]] = [
        (bert, {"token_dim": 32, "num_attention_heads": 8},
         r"make keys of 8 heads of 4, and encoder\.layer\.0\.attention\.self has 4 of 8; leave"),
        (llama, {"num_layers": 9}, r"num_layers=9, and a LlamaForCausalLM has 2 attentions"),
        (llama, {"target_modules": ["q_proj"]}, "into every attention; leave target_modules out"),
    ]  # fmt: skip
    for family, options, text in cases:
        with pytest.raises(TargetError, match=text):
            get_peft_model(family.build(), PrefixTuningConfig(**options))
    with pytest.raises(TargetError, match="no attention of a Sequential calls transformers'"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), PrefixTuningConfig(token_dim=2))
    with pytest.raises(ValueError, match="init_weights='ones' is not known"):
        PrefixTuningConfig(init_weights="ones")
    with pytest.raises(ValueError, match=r"num_frozen_tokens=3 of num_virtual_tokens=2: there are"):
        CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3)
    with pytest.raises(ValueError, match="num_frozen_tokens must be a whole number from 0 on"):
        CartridgeConfig(num_frozen_tokens=-1)


def test_fewer_layers_get_a_prefix() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=1)
    model = get_peft_model(FAMILIES["llama"].build(), config)
    assert list(model.base_model.hosts()) == ["model.layers.0.self_attn"]
    run(model, "llama")


def test_texts_that_do_not_fit() -> None:
    f = FAMILIES["llama"]
    config = PrefixTuningConfig(task_type=f.task, num_virtual_tokens=4)
    model = get_peft_model(f.build(), config, "p")
    model.add_adapter("made", PrefixTuningConfig(task_type=f.task, prefix_projection=True))
    model.add_adapter("tokens", PromptTuningConfig(task_type=f.task))

    def start(keys: Any, **options: Any) -> None:
        initialize_kv_prefix_from_past_key_values(model, past_key_values=keys, **options)

    one = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="'made' are made by a projection"):
        start([(one, one)] * 2, adapter_name="made")
    with pytest.raises(ValueError, match="'tokens' is a PROMPT_TUNING adapter; only those with"):
        start([(one, one)] * 2, adapter_name="tokens")
    with pytest.raises(StateError, match="there is no adapter 'q'"):
        start([(one, one)] * 2, adapter_name="q")
    with pytest.raises(ValueError, match="holds no layer; call the model with use_cache=True"):
        start([])
    with pytest.raises(ValueError, match=r"holds 3 tokens for 4 virtual tokens"):
        start([(one[:, :, :3], one[:, :, :3])] * 2)
    with pytest.raises(ValueError, match=r"a prefix can be made of one row"):
        start([(one.expand(2, -1, -1, -1),) * 2] * 2)
    with pytest.raises(StateError, match=r"the shape \(4, 32\), and the adapter has \(4, 6"):
        start([(one, one)])
    with pytest.raises(TypeError, match="past_key_values is a int; give the cache"):
        start(3)


def test_cartridges_that_cannot_be_composed(tmp_path: Path) -> None:
    f = FAMILIES["llama"]
    for name, config in (
        ("a", CartridgeConfig(task_type=f.task, num_virtual_tokens=2)),
        ("b", CartridgeConfig(task_type=f.task, num_virtual_tokens=2, num_layers=1)),
        ("p", PrefixTuningConfig(task_type=f.task, num_virtual_tokens=2)),
    ):
        get_peft_model(f.build(), config).save_pretrained(tmp_path / name)
    a, b, p, out = (tmp_path / name for name in ("a", "b", "p", "out"))
    with pytest.raises(ValueError, match="1 adapters cannot be composed; give two or more"):
        compose_cartridge_adapters([a], output_path=out)
    with pytest.raises(ValueError, match=r"has num_layers=1 and .*cartridges of one model"):
        compose_cartridge_adapters([a, b], output_path=out)
    with pytest.raises(FileError, match="holds a PREFIX_TUNING adapter, not a CARTRIDGE"):
        compose_cartridge_adapters([a, p], output_path=out)
    with pytest.raises(ValueError, match="pickle files are not written"):
        compose_cartridge_adapters([a, a], output_path=out, safe_serialization=False)
    assert not out.exists()


def test_the_first_rows_of_a_cartridge_never_train() -> None:
    f = FAMILIES["llama"]
    config = CartridgeConfig(task_type=f.task, num_virtual_tokens=4, num_frozen_tokens=1)
    model = get_peft_model(f.build(), config)
    assert model.get_nb_trainable_parameters()[0] == 3 * 2 * 2 * 16
    before = table(model).whole().detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs("llama")).logits.square().sum().backward()
    optimizer.step()
    after = table(model).whole().detach()
    assert torch.equal(before[0], after[0]) and (before[1:] != after[1:]).any(1).all()


def test_an_attention_that_does_not_ask_is_no_silence() -> None:
    import transformers

    fields = {**FAMILIES["gpt2"].fields, "reorder_and_upcast_attn": True}
    base = transformers.GPT2LMHeadModel._from_config(
        transformers.GPT2Config(**fields), attn_implementation="eager"
    )
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(StateError, match="computed without transformers' attention functions"):
        model(**inputs("gpt2"))
    with pytest.raises(StateError), acting(nn.Identity(), print):
        pass


def test_masks_of_flash_attention_have_two_axes() -> None:
    def flash_attention_forward() -> None: ...

    def paged_attention_forward() -> None: ...

    assert kind_of(flash_attention_forward) == "flash"
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)
    own = torch.tensor([[False, True], [True, True]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    assert View("flash", 2, None, True, 4).lengthened(None, q, k) is None
    found = View("flash", 2, own, True, 4).lengthened(mask, q, k)
    assert found.tolist() == [[0, 1, 0, 1, 1, 1, 1], [1] * 7]
    found = View("flash", 2, own, True, 4).lengthened(None, q, k)
    assert found.tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    with pytest.raises(StateError, match="in front of those in pages"):
        kind_of(paged_attention_forward)
