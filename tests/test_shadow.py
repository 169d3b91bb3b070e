"""ShadowPEFT: what it computes, its files, and the real peft as oracle."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftwork import (
    LoraConfig,
    MergeError,
    PeftModel,
    ShadowConfig,
    StateError,
    TargetError,
    get_peft_model,
)
from graftwork.testing.bench import shake
from tiny import IDS, build, enable_checkpointing, run

SMALL = {
    "shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_hidden_layers": 2,
    "shadow_intermediate_size": 24, "update_hidden_size": 5, "shadow_alpha": 0.7,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "small": ("llama", SMALL),
    "gpt2": ("gpt2", {}),
    "one_block": ("llama", {"target_modules": ["layers.1"]}),
    "own_embeddings": ("llama", {"share_embeddings": False, "init_weights": False}),
    "experts": ("mixtral", {"target_modules": r".*\.layers\.\d+$", "r": 3}),
}


def shadowed(name: str = "llama", size: float = 0.3, **options: Any) -> PeftModel:
    config = ShadowConfig(**{"task_type": "CAUSAL_LM", **options})
    torch.manual_seed(0)
    model = get_peft_model(build(name), config).eval()
    shake(model, size)
    return model


@torch.no_grad()
def greedy(model: Any, steps: int = 4) -> Tensor:
    ids = IDS
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_it_starts_as_the_model_and_corrects_each_block() -> None:
    base = run(build("llama"), "llama")
    model = shadowed(size=0.0)
    assert torch.equal(run(model, "llama"), base)
    shake(model, 0.3)
    seen: list[Any] = []
    inner = model.get_base_model().model
    for layer in inner.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer.base_layer.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    y = run(model, "llama")
    assert not torch.allclose(y, base)
    file = {k.removeprefix("base_model.model.model.layers."): t for k, t in state(model).items()}
    with torch.no_grad():
        embedded = inner.embed_tokens(IDS)
        side = model.base_model.switch.shared["default"]
        s = side.backbone(inputs_embeds=embedded).last_hidden_state
        for i in range(2):
            h, entered, out = seen[3 * i : 3 * i + 3]
            down, up = (file[f"{i}.shadow_{n}.default.weight"] for n in ("down", "up"))
            want = h + 0.1 * (h - s) @ down.mT @ up.mT
            torch.testing.assert_close(entered, want, rtol=1e-5, atol=1e-5)

            def mlp(name: str, x: Tensor, i: int = i) -> Tensor:
                w = [file[f"{i}.shadow_update_{name}.default.{n}.weight"] for n in (0, 2)]
                b = [file[f"{i}.shadow_update_{name}.default.{n}.bias"] for n in (0, 2)]
                return nn.functional.gelu(x @ w[0].mT + b[0]) @ w[1].mT + b[1]

            g = mlp("gate", out).sigmoid()
            s = (1 - g) * s + g * mlp("transform", out)
    with model.disable_adapter():
        assert torch.equal(run(model, "llama"), base)


def state(model: PeftModel) -> dict[str, Tensor]:
    from graftwork import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_and_answers_are_those_of_peft(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    name, options = VARIANTS[variant]
    ours = shadowed(name, **options)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.get_peft_model(
        build(name), peft.ShadowConfig(task_type="CAUSAL_LM", **options)
    ).eval()
    shake(theirs, 0.3, seed=4)
    theirs.save_pretrained(tmp_path / "theirs")
    layouts, configs = [], []
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        tensors = load_file(folder / "adapter_model.safetensors")
        layouts.append({k: (tuple(t.shape), t.dtype) for k, t in tensors.items()})
        configs.append(json.loads((folder / "adapter_config.json").read_text()).keys())
    assert layouts[0] == layouts[1] and configs[0] == configs[1]
    read = PeftModel.from_pretrained(build(name), tmp_path / "theirs")
    written = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
    for mine, other in ((read, theirs), (ours, written)):
        with torch.no_grad():
            a, b = (model(input_ids=IDS, labels=IDS) for model in (mine, other))
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.last_shadow_loss, other.base_model.last_shadow_loss)
    again = PeftModel.from_pretrained(build(name), tmp_path / "ours")
    assert torch.equal(run(again, name), run(ours, name))


@pytest.mark.filterwarnings("ignore")
def test_training_takes_the_same_steps_as_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = shadowed(shadow_dropout=0.0, auxiliary_loss_weight=0.5, size=0.1)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    losses: list[list[float]] = [[], []]
    for i, model in enumerate((ours.train(), theirs.train())):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == 11008
        optimizer = torch.optim.SGD(trained, lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses[i].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]
    owned = {n for n, p in ours.named_parameters() if p.requires_grad}
    unused = {
        n for n in owned if "layers.1." in n and (".T." in n or ".G." in n)
    }  # behind the last
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == owned - unused


@pytest.mark.filterwarnings("ignore")
def test_classifiers_are_those_of_peft(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    peft = pytest.importorskip("peft")

    def base() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_labels=3, pad_token_id=0,
        )  # fmt: skip
        return LlamaForSequenceClassification(config).eval()

    theirs = peft.get_peft_model(base(), peft.ShadowConfig(task_type="SEQ_CLS")).eval()
    shake(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    inputs = {"input_ids": IDS * mask, "attention_mask": mask, "labels": torch.tensor([2, 0])}
    with torch.no_grad():
        a, b = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-5)
    alone, want = ours.unload_shadow(), theirs.base_model.unload_shadow()
    torch.testing.assert_close(alone(**inputs).logits, want(**inputs).logits)


def test_it_generates_without_a_cache() -> None:
    model = shadowed()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, **options), greedy(model))
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=IDS, **options), greedy(build("llama")))
    beams = model.generate(input_ids=IDS, num_beams=2, **options)
    names = ["__base__", "default"]
    mixed = model.generate(input_ids=IDS, num_beams=2, adapter_names=names, **options)
    assert torch.equal(mixed[1], beams[1]) and not torch.equal(mixed[0], beams[0])


def test_the_shadow_lives_on_its_own(tmp_path: Path) -> None:
    model = shadowed()
    side = model.base_model.switch.shared["default"]
    with torch.no_grad():
        s = side.backbone(inputs_embeds=model.get_input_embeddings()(IDS)).last_hidden_state
        want = model.get_output_embeddings()(s)
        for alone in (model.unload_shadow(), model.unload_shadow("default", copy=True)):
            torch.testing.assert_close(alone(input_ids=IDS).logits, want)
    out = alone.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, greedy(alone))
    shake(alone, 0.3)
    torch.testing.assert_close(model.unload_shadow()(input_ids=IDS).logits, want)
    loss, alone_loss = model(input_ids=IDS, labels=IDS).loss, model.last_shadow_loss
    plain = nn.functional.cross_entropy(
        run(model, "llama")[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    )
    shadow = nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss.detach(), plain + 0.05 * shadow)
    torch.testing.assert_close(alone_loss, shadow)


def test_a_trained_model_may_be_the_shadow(tmp_path: Path) -> None:
    small: Any = build("gpt2").transformer  # another architecture, of the same width
    small.save_pretrained(tmp_path / "plain")
    model = shadowed(size=0.0, shadow_model=str(tmp_path / "plain"))
    side = model.base_model.switch.shared["default"]
    assert torch.equal(side.backbone.wte.weight, small.wte.weight)
    assert not side.backbone.wte.weight.requires_grad and side.backbone.wpe.weight.requires_grad
    shake(model, 0.3)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "saved")
    assert torch.equal(run(loaded, "llama"), run(model, "llama"))
    tensors = {f"shadow_model.{k}": t.contiguous() for k, t in small.state_dict().items()}
    weight = torch.randn(32, 32)
    (tmp_path / "projected").mkdir()
    save_file(
        {**tensors, "shadow_hidden_projection.weight": weight},
        tmp_path / "projected" / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    config = {
        "model_type": "causal_lm_with_hidden_projection",
        "shadow_model_config": small.config.to_dict(),
    }
    (tmp_path / "projected" / "config.json").write_text(json.dumps(config))
    side = shadowed(
        size=0.0, shadow_model=str(tmp_path / "projected")
    ).base_model.switch.shared["default"]  # fmt: skip
    assert torch.equal(side.projection.weight, weight)
    assert torch.equal(side.backbone.h[0].mlp.c_fc.weight, small.h[0].mlp.c_fc.weight)


def test_it_lives_beside_other_adapters(tmp_path: Path) -> None:
    base = build("llama")
    modules = dict(base.named_modules())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    shake(model, 0.3)
    lora = run(model, "llama")
    model.add_adapter("a", ShadowConfig(r=4))
    model.add_adapter("b", ShadowConfig(r=2, layers_to_transform=[1], **SMALL))
    assert torch.equal(run(model, "llama"), lora)
    answers = []
    for names in (["a"], ["b"], ["a", "b"], ["default", "a"]):
        model.set_adapter(names)
        shake(model, 0.1, seed=len(answers))
        answers.append(run(model, "llama"))
        assert all(not torch.allclose(answers[-1], other) for other in (*answers[:-1], lora))
    model.set_adapter("b")
    assert {row.site for row in model.adapters() if row.adapter == "b"} == {"model.layers.1"}
    singles = []
    for name in ("a", "b"):
        model.set_adapter(name)
        singles.append(run(model, "llama"))
    with torch.no_grad():
        rows = model(IDS, adapter_names=["a", "b"]).logits
        other = model(IDS, adapter_names=["__base__", "a"]).logits
    torch.testing.assert_close(rows, torch.stack([singles[0][0], singles[1][1]]))
    torch.testing.assert_close(other[0], run(build("llama"), "llama")[0])
    torch.testing.assert_close(other[1], singles[0][1])
    model.rename_adapter("b", "c")
    model.set_adapter("c")
    assert torch.equal(run(model, "llama"), singles[1])
    model.save_pretrained(tmp_path)
    assert model.load_adapter(tmp_path / "c", "again").ok
    model.set_adapter("again")
    assert torch.equal(run(model, "llama"), singles[1])
    with pytest.raises(MergeError, match="depends on the input"):
        model.merge_adapter()
    model.set_adapter("default")
    model.delete_adapter(["again", "a", "c"])
    assert not model.base_model.switch.shared
    assert torch.equal(run(model, "llama"), run(model, "llama"))
    assert dict(model.unload().named_modules()) == modules
    assert torch.equal(run(base, "llama"), run(build("llama"), "llama"))


def test_copies_compiled_models_and_checkpointing_do_the_same() -> None:
    model = shadowed(shadow_dropout=0.0)
    y = run(model, "llama")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, "llama"), y)
        shake(twin, 0.2, seed=8)
        assert not torch.equal(run(twin, "llama"), y) and torch.equal(run(model, "llama"), y)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, "llama"), y)

    gradients = []
    for on in (False, True):
        if on:
            enable_checkpointing(model.get_base_model(), {"use_reentrant": False})
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient)


def test_bf16() -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama").to(torch.bfloat16), ShadowConfig(r=4)).eval()
    shake(model, 0.1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert run(model, "llama").dtype == torch.bfloat16
    model = shadowed()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
        rounded = run(model, "llama")
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), run(model, "llama"), rtol=0.1, atol=0.1)


def test_other_models() -> None:
    model = get_peft_model(build("bert"), ShadowConfig(r=4)).eval()
    assert torch.equal(run(model, "bert"), run(build("bert"), "bert"))
    shake(model, 0.3)
    assert not torch.allclose(run(model, "bert"), run(build("bert"), "bert"))


def test_errors_name_the_remedy() -> None:
    for name, config, words in (
        ("llama", ShadowConfig(target_modules=["q_proj"]), "name blocks, such as"),
        ("llama", ShadowConfig(target_modules=["layers"]), "name blocks, such as"),
        ("llama", ShadowConfig(layers_to_transform=[7]), "entry 7 is no block"),
        ("llama", ShadowConfig(target_modules=["layer.1"]), "matches no module"),
        ("t5", ShadowConfig(), "one stack of transformer blocks"),
        ("plain", ShadowConfig(), "one stack of transformer blocks"),
    ):
        base = build(name)
        before = [n for n, _ in base.named_modules()]
        with pytest.raises(TargetError, match=words):
            get_peft_model(base, config)
        assert [n for n, _ in base.named_modules()] == before
    for options in (
        {"r": 0},
        {"shadow_dropout": 2},
        {"shadow_model": "x", "shadow_hidden_size": 8},
    ):
        with pytest.raises(ValueError):
            ShadowConfig(**options)  # type: ignore[arg-type]
    model = shadowed()
    with pytest.raises(StateError, match="call the PeftModel"):
        model.get_base_model()(IDS)
    with pytest.raises(StateError, match="use_cache=False"):
        model(IDS, past_key_values=build("llama")(IDS).past_key_values)
