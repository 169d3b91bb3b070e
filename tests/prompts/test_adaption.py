"""LLaMA-Adapter: as PEFT's where PEFT has it, and what the engine gives to every method."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TargetError,
    get_peft_model,
)
from graftwork.errors import MergeError
from prompts.families import FAMILIES, inputs, result

pytestmark = [  # of PEFT's and torch's code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PEFTS = ("llama", "mistral", "gpt2")
OTHERS = ("llama_bias", "qwen2", "gemma3", "gemma4", "bart", "whisper", "vit", "bert",
          "t5", "deberta_v2")  # fmt: skip
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def family(name: str) -> Any:
    if name != "llama_bias":
        return FAMILIES[name]
    f = FAMILIES["llama"]
    return type(f)(f.model, f.config, {**f.fields, "attention_bias": True}, f.kind)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def run(model: Any, name: str, **options: Any) -> Tensor:
    return result(model(**inputs(name.removesuffix("_bias")), **options))


@torch.no_grad()
def open_gates(model: PeftModel, value: float = 0.7) -> None:
    for host in model.base_model.hosts().values():
        for name in host.adapters:
            for _, part in host.parts_of(name):
                if hasattr(part, "g"):
                    part.g.fill_(value)


def made(name: str, layers: int = 1, **options: Any) -> PeftModel:
    f = family(name)
    config = AdaptionPromptConfig(task_type=f.task, adapter_len=5, adapter_layers=layers, **options)
    torch.manual_seed(0)
    return get_peft_model(f.build(), config).eval()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", PEFTS)
def test_as_pefts_both_ways(name: str, layers: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    f = family(name)
    ours = made(name, layers)
    torch.manual_seed(0)
    config = peft.AdaptionPromptConfig(task_type=f.task, adapter_len=5, adapter_layers=layers)
    theirs = peft.get_peft_model(f.build(), config).eval()
    base = run(f.build(), name)
    assert torch.equal(run(ours, name), base)  # the gates are closed
    open_gates(ours)
    for key, p in theirs.named_parameters():
        if key.endswith("adaption_gate"):
            p.data.fill_(0.7)
    y = run(ours, name)
    assert not torch.allclose(y, base, atol=1e-3)
    close(run(theirs, name), y)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    close(run(peft.PeftModel.from_pretrained(f.build(), tmp_path / "ours").eval(), name), y)
    close(run(PeftModel.from_pretrained(f.build(), tmp_path / "theirs").eval(), name), y)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ours.get_nb_trainable_parameters()[0] == count


def test_peft_adds_the_bias_of_the_output_twice() -> None:
    """So that there closed gates change a model whose attention has one."""
    peft = pytest.importorskip("peft")
    f = family("llama_bias")
    config = peft.AdaptionPromptConfig(task_type=f.task, adapter_len=5, adapter_layers=2)
    base = run(f.build(), "llama")
    assert not torch.allclose(run(peft.get_peft_model(f.build(), config), "llama"), base, atol=1e-3)
    assert torch.equal(run(made("llama_bias", 2), "llama"), base)


def test_by_hand() -> None:
    """Of one attention: what it gave, and g softmax(q P_k') P_v through its output's projection."""
    model = made("llama", 2)
    open_gates(model)
    host = model.base_model.hosts()["model.layers.0.self_attn"]
    m: Any = host.base_layer
    seen: list[Any] = []
    handle = host.register_forward_hook(lambda *a: seen.append(a[1:]), with_kwargs=True)
    run(model, "llama")
    handle.remove()
    args, kwargs, out = seen[0]
    with torch.no_grad():
        plain = m(*args, **kwargs)[0]
    x = kwargs.get("hidden_states", args[0] if args else None)
    cos, sin = kwargs["position_embeddings"]
    part: Any = host.parts_of("default")[0][1]
    y = torch.zeros(4, 9, 32)
    with torch.no_grad():
        for h in range(4):
            q = m.q_proj(x)[..., 8 * h : 8 * h + 8]
            q = q * cos + torch.cat([-q[..., 4:], q[..., :4]], dim=-1) * sin
            at = slice(8 * (h // 2), 8 * (h // 2) + 8)  # two heads of queries share keys
            k, v = m.k_proj(part.P)[0, :, at], m.v_proj(part.P)[0, :, at]
            y[..., 8 * h : 8 * h + 8] = 0.7 * (q @ k.T / 8**0.5).softmax(-1) @ v
        close(out[0], plain + m.o_proj(y))


@pytest.mark.parametrize("name", [*PEFTS, *OTHERS])
def test_rows_of_a_mixed_batch_are_as_alone(name: str) -> None:
    f = family(name)
    model = made(name, 2)
    options = {"task_type": f.task}
    model.add_adapter("b", AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **options))
    model.add_adapter("p", PrefixTuningConfig(num_virtual_tokens=4, **options))
    lora = LoraConfig(
        r=2, target_modules=r".*(v_proj|c_attn|value|value_proj|\.v)", init_lora_weights=False
    )
    model.add_adapter("lora", lora)
    open_gates(model)
    x = inputs(name.removesuffix("_bias"))
    for names in (["default", "b", "__base__", "lora"], ["p", "default", "b", "lora"]):
        y = run(model, name, adapter_names=names)
        for i, one in enumerate(names):
            own = {key: value[i : i + 1] for key, value in x.items()}
            with torch.no_grad(), model.base_model.using(*([one] if one != "__base__" else [])):
                close(y[i : i + 1], result(model(**own)))
    with model.disable_adapter():
        assert torch.equal(run(model, name), run(f.build(), name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_step_by_step_is_as_at_once(name: str) -> None:
    model, x = made(name, 2), inputs(name)
    open_gates(model)
    options = {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        out = model.generate(input_ids=x["input_ids"], **GENERATE, **options)
    x = (
        {**x, "decoder_input_ids": out.sequences}
        if name == "bart"
        else {"input_ids": out.sequences}
    )
    with torch.no_grad():
        close(result(model(**x))[:, -7:-1], torch.stack(out.logits, dim=1))


def test_gradients_with_checkpoints_are_those_without() -> None:
    found = []
    for reentrant in (None, True, False):
        model = made("llama", 2).train()
        open_gates(model)
        if reentrant is not None:
            base: Any = model.get_base_model()
            name = "activation_checkpointing_enable"
            enable = getattr(base, name, None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        result(model(**inputs("llama"))).pow(2).mean().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    assert found[0].abs().max() > 0
    for other in found[1:]:
        close(other / found[0].abs().max(), found[0] / found[0].abs().max())


def test_with_a_prefix_and_a_lora_in_one_model() -> None:
    model = made("llama", 2)
    options = {"task_type": "CAUSAL_LM"}
    model.add_adapter("p", PrefixTuningConfig(num_virtual_tokens=4, **options))
    lora = LoraConfig(r=2, target_modules=["k_proj", "q_proj"], init_lora_weights=False)
    model.add_adapter("lora", lora)
    open_gates(model)
    names = ["default", "p", "lora"]
    model.set_adapter(names)
    y = run(model, "llama")
    for left in names:
        with model.base_model.using(*(n for n in names if n != left)):
            assert not torch.allclose(run(model, "llama"), y, atol=1e-4)
    model.set_adapter(["p", "default", "lora"])
    close(run(model, "llama"), y)
    model.set_adapter("lora")
    model.merge_adapter()  # the prompt is seen through the weights as they are
    with model.base_model.using(*names):
        close(run(model, "llama"), y)
    model.unmerge_adapter()
    with pytest.raises(MergeError, match="it attends to its prompt, which no weight of a layer"):
        model.base_model.merge_adapter(["default"])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin.set_adapter(names)
    assert torch.equal(run(twin, "llama"), y)
    torch._dynamo.reset()
    model.set_adapter(names)
    close(run(torch.compile(model, backend="eager", fullgraph=True), "llama"), y)
    model.delete_adapter(["p", "lora"])
    model.add_adapter("q", AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **options))
    open_gates(model)
    one, two = run(model, "llama"), None
    model.set_adapter(["default", "q"])  # each is attended to by itself
    two = run(model, "llama")
    assert not torch.allclose(one, two, atol=1e-4)
    close(run(model.unload(), "llama"), run(FAMILIES["llama"].build(), "llama"))


def test_defaults_and_errors(tmp_path: Path) -> None:
    fields = {**FAMILIES["llama"].fields, "num_hidden_layers": 4}
    f = type(FAMILIES["llama"])("LlamaForCausalLM", "LlamaConfig", fields, "decoder")
    model = get_peft_model(f.build(), AdaptionPromptConfig(task_type="CAUSAL_LM"))
    config: Any = model.peft_config["default"]
    assert (config.adapter_len, config.adapter_layers) == (10, 2)
    paths = ["model.layers.2.self_attn", "model.layers.3.self_attn"]
    assert list(model.base_model.hosts()) == paths
    assert config.to_dict()["target_modules"] == "self_attn"
    again = get_peft_model(f.build(), config)
    assert list(again.base_model.hosts()) == paths
    with pytest.raises(TargetError, match="adapter_layers=9, and the model has 4 such attentions"):
        get_peft_model(f.build(), AdaptionPromptConfig(adapter_layers=9))
    with pytest.raises(TargetError, match=r"'mlp' names no attention .*has \['self_attn'"):
        get_peft_model(f.build(), AdaptionPromptConfig(target_modules="mlp"))
    with pytest.raises(TargetError, match=r"a layer for keys and one for values.*model has none"):
        get_peft_model(FAMILIES["modernbert"].build(), AdaptionPromptConfig())
    with pytest.raises(ValueError, match="adapter_len must be at least 1, not 0"):
        AdaptionPromptConfig(adapter_len=0)
