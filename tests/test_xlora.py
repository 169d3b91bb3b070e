"""X-LoRA: what it computes, its files, and the real peft as oracle."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftwork import (
    FileError,
    LoraConfig,
    MergeError,
    PeftModel,
    StateError,
    TargetError,
    XLoraConfig,
    get_peft_model,
)
from graftwork.testing.bench import shake
from tiny import IDS, build, enable_checkpointing, run

CLASSIFIER = "base_model.internal_xlora_classifier.layers."
TARGETS = (["q_proj", "v_proj"], ["q_proj", "down_proj", "embed_tokens"])
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 8},
    "deep": {"xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0, "softmax_temperature": 0.3},
    "first": {"scaling_pass_value": 0.7, "global_scaling_weight": 2.0},
    "top": {"top_k_lora": 1, "scaling_pass_value": 0.5},
    "top_softmax": {
        "enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 1,
        "scaling_pass_value": 0.3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two trained LoRAs, by PEFT's names for experts."""
    folder = tmp_path_factory.mktemp("experts")
    for i, targets in enumerate(TARGETS):
        model = get_peft_model(build("llama"), LoraConfig(r=2 + i, target_modules=targets))
        shake(model, 0.3, seed=i)
        model.save_pretrained(folder / str(i), save_embedding_layers=False)
    return {str(i): str(folder / str(i)) for i in range(2)}


def mixed(experts: dict[str, str], **options: Any) -> PeftModel:
    config = XLoraConfig(task_type="CAUSAL_LM", adapters=experts, **options)
    model = get_peft_model(build("llama"), config).eval()
    shake(model, 0.3, seed=5)
    return model


def without_cache() -> Any:
    model: Any = build("llama")
    model.config.use_cache = False
    return model


def test_it_is_the_sum_of_its_experts_with_these_scalings(experts: dict[str, str]) -> None:
    model = mixed(experts, global_scaling_weight=0.5)
    want: list[Tensor] = []
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda _, args, out: want.extend([args[0], out]))
    y = run(model, "llama")
    lora = load_file(Path(experts["1"]) / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.model.layers.0.mlp.down_proj.lora_{f}.weight"] for f in "AB")
    s = model.get_latest_scalings()[:, :, 0, 1:]
    x, out = want[-2:]
    update = 0.5 * s * (x @ a.mT @ b.mT) * 8 / 3
    torch.testing.assert_close(out, layer.base_layer(x) + update, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, run(build("llama"), "llama"))
    with model.disable_adapter():
        assert torch.equal(run(model, "llama"), run(build("llama"), "llama"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_and_answers_are_those_of_peft(
    variant: str, experts: dict[str, str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = mixed(experts, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    want, tensors = run(model, "llama"), load_file(tmp_path / "adapter_model.safetensors")
    options = {"hidden_size": 32, "adapters": experts, **VARIANTS[variant]}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(without_cache(), config).eval()
    own = {k: tuple(t.shape) for k, t in theirs.state_dict().items() if "xlora_classifier" in k}
    assert {k: tuple(t.shape) for k, t in tensors.items()} == own
    theirs.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(run(theirs, "llama"), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.get_latest_scalings(), model.get_latest_scalings())
    read = peft.PeftModel.from_pretrained(without_cache(), tmp_path).eval()
    torch.testing.assert_close(run(read, "llama"), want, rtol=1e-5, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    configs = [
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "theirs")
    ]
    assert configs[0].keys() == configs[1].keys()
    # PEFT 0.21.2 writes the classifier's layers 0 and 1 into the experts' folders, loses tensors of
    # the experts there, and cannot read what it has written; here all is found
    assert f"{CLASSIFIER}0.weight" not in load_file(tmp_path / "theirs/adapter_model.safetensors")
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "theirs")
    torch.testing.assert_close(run(back, "llama"), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_training_and_generation_are_those_of_peft(experts: dict[str, str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = mixed(experts, layerwise_scalings=True)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(without_cache(), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        out = model.eval().generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
        assert out.shape == (2, 11)
        want = out if model is ours else want  # noqa: F821
        assert torch.equal(out, want)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    beams = ours.generate(input_ids=IDS, **options)
    both = ours.generate(input_ids=IDS, adapter_names=["__base__", "default"], **options)
    assert torch.equal(both[1], beams[1])
    losses: list[list[float]] = [[], []]
    for i, model in enumerate((ours.train(), theirs.train())):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == 33 * 2 * 7
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses[i].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]


def test_a_folder_holds_the_experts_too(experts: dict[str, str], tmp_path: Path) -> None:
    model = mixed(experts, use_trainable_adapters=True)
    assert len([p for p in model.parameters() if p.requires_grad]) == 2 + 2 * 2 * (2 + 2) + 2
    shake(model, 0.1, seed=7)
    want = run(model, "llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["adapters"] = {name: "/nowhere/at/all" for name in config["adapters"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for file in tmp_path.glob(".adapter_config*"):
        file.unlink()
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(loaded, "llama"), want)
    lora = PeftModel.from_pretrained(build("llama"), tmp_path / "1")  # each is an adapter itself
    assert not torch.equal(run(lora, "llama"), run(build("llama"), "llama"))

    again = mixed(experts, use_trainable_adapters=True)
    again.save_pretrained(tmp_path / "b")
    before = run(again, "llama")
    shake(again, 0.2, seed=9)
    again.load_adapter(tmp_path / "b", "default")
    assert torch.equal(run(again, "llama"), before)


def test_experts_keep_their_order_whatever_their_names(
    experts: dict[str, str], tmp_path: Path
) -> None:
    named = {"10": experts["0"], "9": experts["1"], "b": experts["0"], "a": experts["1"]}
    model = mixed(named)
    assert list(model.peft_config["default"].adapters) == ["9", "10", "a", "b"]
    model.save_pretrained(tmp_path)
    assert torch.equal(
        run(PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), run(model, "llama")
    )


def test_it_lives_beside_other_adapters(experts: dict[str, str], tmp_path: Path) -> None:
    base = build("llama")
    modules = dict(base.named_modules())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    shake(model, 0.3)
    lora = run(model, "llama")
    model.add_adapter("mix", XLoraConfig(adapters=experts))
    model.add_adapter("other", XLoraConfig(adapters={"1": experts["1"]}, scaling_pass_value=1.0))
    assert torch.equal(run(model, "llama"), lora)
    answers = []
    for names in (["mix"], ["other"], ["mix", "other"], ["default", "mix"]):
        model.set_adapter(names)
        answers.append(run(model, "llama"))
    assert all(not torch.allclose(a, b) for a, b in pairwise(answers))
    with torch.no_grad():
        rows = model(IDS, adapter_names=["mix", "__base__"]).logits
    torch.testing.assert_close(rows[:1], answers[0][:1])
    torch.testing.assert_close(rows[1:], run(build("llama"), "llama")[1:])
    model.rename_adapter("mix", "mixture")
    model.set_adapter("mixture")
    assert torch.equal(run(model, "llama"), answers[0])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "mixture" / "1" / "adapter_config.json").is_file()
    report = model.load_adapter(tmp_path / "mixture", "again")
    model.set_adapter("again")
    assert report.ok and torch.equal(run(model, "llama"), answers[0])
    with pytest.raises(MergeError, match="depends on the input"):
        model.merge_adapter()
    model.set_adapter("default")
    model.delete_adapter(["again", "other", "mixture"])
    assert torch.equal(run(model, "llama"), lora)
    assert dict(model.unload().named_modules()) == modules


def test_verbs(experts: dict[str, str]) -> None:
    model = mixed(experts)
    assert model.get_latest_scalings() is None
    model.enable_scalings_logging()
    run(model, "llama")
    model(IDS[:, :3])
    model.disable_scalings_logging()
    y = run(model, "llama")
    log = model.get_scalings_log()
    assert [s.shape for s in log] == [(2, 8, 7, 2), (2, 3, 7, 2)]
    torch.testing.assert_close(log[0].sum(-1), torch.ones(2, 8, 7))
    assert {n: places for n, (places, _) in model.get_bucketed_scalings_log().items()} == {
        8: [0], 3: [1],
    }  # fmt: skip
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    model.set_topk_lora(1)
    assert not torch.allclose(run(model, "llama"), y)
    assert model.peft_config["default"].top_k_lora == 1
    model.set_topk_lora(None)
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0.0
    torch.testing.assert_close(run(model, "llama"), run(build("llama"), "llama"))
    model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == 0.5
    with pytest.raises(ValueError, match="between 1 and the 2 experts"):
        model.set_topk_lora(3)
    with pytest.raises(AttributeError):
        model.get_latest_scaling  # noqa: B018


def test_copies_compiled_models_and_checkpointing_do_the_same(experts: dict[str, str]) -> None:
    model = mixed(experts, layerwise_scalings=True, scaling_pass_value=0.5)
    y = run(model, "llama")
    twin = copy.deepcopy(model)
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
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_other_models(tmp_path: Path) -> None:
    for name, target in (("gpt2", "c_attn"), ("mixtral", "q_proj")):
        model = get_peft_model(build(name), LoraConfig(r=2, target_modules=[target]))
        shake(model, 0.3)
        model.save_pretrained(tmp_path / name)
        model = get_peft_model(build(name), XLoraConfig(adapters={"0": str(tmp_path / name)}))
        assert not torch.allclose(run(model, name), run(build(name), name))


def test_other_experts_are_swapped_in(experts: dict[str, str], tmp_path: Path) -> None:
    model, folders = mixed(experts), {}
    for i, targets in enumerate(TARGETS):
        lora = get_peft_model(build("llama"), LoraConfig(r=2 + i, target_modules=targets))
        shake(lora, 0.3, seed=7 + i)
        folders[str(i)] = str(tmp_path / str(i))
        lora.save_pretrained(folders[str(i)], save_embedding_layers=False)
    other = mixed(folders)
    shake(other, 0.3, seed=8)
    other.save_pretrained(tmp_path / "mix")
    model.hotswap_adapter(tmp_path / "mix")
    assert torch.equal(run(model, "llama"), run(other, "llama"))
    before = run(model, "llama")
    mixed({"0": folders["0"], "1": folders["0"]}).save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(FileError, match=r"lacks model\.embed_tokens"):
        model.hotswap_adapter(tmp_path / "elsewhere")
    mixed({"0": folders["1"], "1": folders["0"]}).save_pretrained(tmp_path / "other")
    with pytest.raises(FileError, match="do not both have experts"):
        model.hotswap_adapter(tmp_path / "other")
    assert torch.equal(run(model, "llama"), before)


def test_errors_name_the_remedy(experts: dict[str, str], tmp_path: Path) -> None:
    base: nn.Module = build("llama")
    names = [name for name, _ in base.named_modules()]
    get_peft_model(
        build("llama"), LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    ).save_pretrained(tmp_path / "bias")
    get_peft_model(
        build("llama"), LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "cut")  # fmt: skip
    get_peft_model(
        build("gpt2"), LoraConfig(r=2, target_modules=["c_attn"])
    ).save_pretrained(tmp_path / "gpt2")  # fmt: skip
    file = tmp_path / "cut" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, {"format": "pt"})
    for config, kind, words in (
        (XLoraConfig(), ValueError, "name them"),
        (XLoraConfig(adapters={"0": str(tmp_path / "bias")}), TargetError, "no plain LoRA"),
        (XLoraConfig(adapters={"0": str(tmp_path / "cut")}), FileError, "is not there in the sha"),
        (XLoraConfig(adapters={"0": str(tmp_path / "gpt2")}), TargetError, "c_attn"),
        (XLoraConfig(adapters={"0": str(tmp_path / "none")}), FileError, "there is no folder"),
        (XLoraConfig(adapters=experts, hidden_size=8), ValueError, "hidden_size=8, but"),
        (XLoraConfig(adapters=experts, top_k_lora=3), ValueError, "top_k_lora=3"),
    ):
        with pytest.raises(kind, match=words):
            get_peft_model(base, config)
        assert [name for name, _ in base.named_modules()] == names
    for options in ({"xlora_depth": 0}, {"xlora_dropout_p": 1.5}, {"adapters": {"a.b": "x"}}):
        with pytest.raises((ValueError, StateError)):
            XLoraConfig(**options)  # type: ignore[arg-type]
    get_peft_model(build("plain"), LoraConfig(r=2, target_modules=["conv2"])).save_pretrained(
        tmp_path / "conv"
    )
    with pytest.raises(TargetError, match="scales tokens"):
        get_peft_model(
            build("plain"), XLoraConfig(adapters={"0": str(tmp_path / "conv")}, hidden_size=16)
        )
    model = mixed(experts)
    with pytest.raises(StateError, match="call the PeftModel"):
        model.get_base_model()(IDS)
    with pytest.raises(StateError, match="use_cache=False"):
        model(IDS, past_key_values=model(IDS).past_key_values)
    model.add_adapter("1", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(StateError, match="rename_adapter"):
        model.save_pretrained(tmp_path / "both")


def test_what_a_config_brings_along_is_saved_with_the_mixture(
    experts: dict[str, str], tmp_path: Path
) -> None:
    model = mixed(experts, modules_to_save=["lm_head"], trainable_token_indices=[1, 3])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(again, "llama"), run(model, "llama"))
    again.load_adapter(tmp_path, "default")
    assert torch.equal(run(again, "llama"), run(model, "llama"))
