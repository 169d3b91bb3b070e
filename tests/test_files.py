"""Adapter folders: strict loading, atomic saving, other bases, pickles, the hub, auto classes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graftwork
from graftwork import (
    AdaLoraConfig,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    FileError,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from graftwork.testing.bench import shake
from tiny import build, run

CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], bias="lora_only"),
    "ia3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "adalora": lambda: AdaLoraConfig(init_r=2, total_step=9, target_modules=["q_proj"]),
    "tokens": lambda: TrainableTokensConfig(token_indices=[3, 5]),
    "lora_tokens": lambda: LoraConfig(r=2, trainable_token_indices=[3, 5]),
}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def saved(folder: Path, config: str = "lora", seed: int = 1) -> PeftModel:
    model = get_peft_model(build("llama"), CONFIGS[config]()).eval()
    shake(model, seed=seed)
    model.save_pretrained(folder)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder; what this library noted in the header is dropped."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def refused(folder: Path) -> str:
    """The text of the error with which a folder is refused; the model is as it was."""
    model = build("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(FileError) as error:
        PeftModel.from_pretrained(model, folder)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())
    return str(error.value)


@pytest.mark.fault("A1")
@pytest.mark.parametrize("config", CONFIGS)
def test_every_tensor_must_be_there_once_and_in_shape(config: str, tmp_path: Path) -> None:
    saved(tmp_path, config)
    kept = load_file(tmp_path / WEIGHTS)
    for name in kept:
        changes: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
            "delete": (lambda t, n=name: t.pop(n), [name, "missing in the file"]),
            "rename": (
                lambda t, n=name: t.update({n + "x": t.pop(n)}),
                [f"{name}x", f"(nearest: {name})", "missing in the file"],
            ),
            "reshape": (
                lambda t, n=name: t.update({n: torch.zeros(7, 7)}),
                [name, "(7, 7) in the file", str(tuple(kept[name].shape))],
            ),
            "add": (
                lambda t, n=name: t.update({n.replace("layers.0", "layers.7") + ".more": t[n] + 1}),
                [".more", "in the file, but not in the adapter"],
            ),
        }
        for change, words in changes.values():
            rewrite(tmp_path, change)
            text = refused(tmp_path)
            assert all(word in text for word in words), text
            assert "strict='warn'" in text and "Nothing was loaded" in text
            save_file(kept, tmp_path / WEIGHTS, {"format": "pt"})
    PeftModel.from_pretrained(build("llama"), tmp_path)


@pytest.mark.fault("A1")
def test_loading_into_an_adapter_is_strict_and_changes_nothing_where_it_fails(
    tmp_path: Path,
) -> None:
    saved(tmp_path, seed=2)
    model = saved(tmp_path / "other")
    want = run(model, "llama")
    rewrite(tmp_path, lambda tensors: tensors.popitem())
    for name in ("default", "new"):
        with pytest.raises(FileError, match="missing in the file"):
            model.load_adapter(tmp_path, name)
    assert list(model.peft_config) == ["default"] and torch.equal(run(model, "llama"), want)
    with pytest.warns(UserWarning, match="did not take effect"):
        report = model.load_adapter(tmp_path, "new", strict="warn")
    assert len(report.missing) == 1 and report.missing_keys == report.missing and not report.ok
    other = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(build("llama"), other).save_pretrained(tmp_path / "rank")
    with pytest.raises(FileError, match=r"another config.*\(r: 3 there, 2 here\)"):
        model.load_adapter(tmp_path / "rank", "default")


def test_what_a_partial_file_lacks_begins_as_new(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n])
    with pytest.warns(UserWarning, match="did not take effect"):
        model = PeftModel.from_pretrained(build("llama"), tmp_path, strict="warn")
    rows = {row.site: row.change for row in model.adapters()}
    assert rows["model.layers.1.self_attn.q_proj"] == 0
    assert rows["model.layers.0.self_attn.q_proj"] > 0


def test_names_of_another_model_are_mapped_on_request(tmp_path: Path) -> None:
    want = run(saved(tmp_path), "llama")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("self_attn.q_proj", "attention.query")] = tensors.pop(name)

    rewrite(tmp_path, rename)
    assert "attention.query" in refused(tmp_path)
    mapping = {r"attention\.query": "self_attn.q_proj"}
    model = PeftModel.from_pretrained(build("llama"), tmp_path, key_mapping=mapping)
    assert torch.equal(run(model, "llama"), want)


# -- saving is whole or not at all


def test_a_crash_between_any_two_steps_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = run(saved(tmp_path / "old", seed=1), "llama"), saved(tmp_path / "new", "dora")
    want = run(new, "llama")
    replace, done = os.replace, 0
    for at in range(1, 20):
        folder = tmp_path / f"crash{at}"
        saved(folder)
        count = 0

        def crash(a: Any, b: Any, at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            replace(a, b)

        monkeypatch.setattr(os, "replace", crash)
        try:
            new.save_pretrained(folder)
            done = at
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", replace)
        model = PeftModel.from_pretrained(build("llama"), folder)
        got = run(model, "llama")
        whole = [type(p).__name__ == "DoRA" for p in model.modules() if hasattr(p, "factors")]
        assert torch.equal(got, want if all(whole) else old) and len(set(whole)) == 1
        new.save_pretrained(folder)  # and saving again heals
        assert torch.equal(run(PeftModel.from_pretrained(build("llama"), folder), "llama"), want)
        assert not list(folder.glob("*.tmp")) and not list(folder.glob(".adapter*"))
        if done:
            break
    assert done > 2


@pytest.mark.parametrize(
    ("call", "number", "text"), [("fsync", 28, "No space left"), ("replace", 13, "Permission")]
)
def test_a_folder_that_cannot_be_written_keeps_the_old_adapter(
    call: str, number: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = run(saved(tmp_path), "llama")
    new = get_peft_model(build("llama"), CONFIGS["dora"]())

    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(FileError, match=rf"{text}.*is intact; choose another"):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(run(PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), old)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


@pytest.mark.fault("A3")
def test_several_adapters_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    model = saved(tmp_path / "x")
    model.add_adapter("b", CONFIGS["ia3"]())
    model.save_pretrained(tmp_path / "all")
    assert (tmp_path / "all" / CONFIG).is_file() and (tmp_path / "all" / "b" / CONFIG).is_file()
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert not (tmp_path / "one" / CONFIG).exists()
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "all", subfolder="b")
    assert again.peft_type.value == "IA3"
    with pytest.raises(FileError, match="has no folder 'c'; it has 'b'"):
        PeftModel.from_pretrained(build("llama"), tmp_path / "all", subfolder="c")
    with pytest.raises(graftwork.StateError, match=r"selected_adapters names \['c'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["c"])
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="is a file; give a folder"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "nowhere", is_main_process=False)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="pickle files are not written"):
        model.save_pretrained(tmp_path, safe_serialization=False)


# -- what is read


@pytest.mark.fault("A11")
def test_another_base_model_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(build("llama"), tmp_path)
        PeftModel.from_pretrained(build("llama").bfloat16(), tmp_path)
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"another base model.*the values of 1 of \d+ sampled"):
        PeftModel.from_pretrained(other, tmp_path)
    larger = build("llama")
    larger.resize_token_embeddings(70)
    text = refused_by(larger, tmp_path)
    assert "the base model differs in" in text and "lm_head.weight: (64, 32) in the file" in text


def refused_by(model: nn.Module, folder: Path) -> str:
    with pytest.raises(FileError) as error:
        PeftModel.from_pretrained(model, folder)
    return str(error.value)


@pytest.mark.fault("K2")
def test_a_pickle_is_read_on_request_only(tmp_path: Path) -> None:
    want = run(saved(tmp_path), "llama")
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    assert "a pickle, which can carry code" in refused(tmp_path)
    model = PeftModel.from_pretrained(build("llama"), tmp_path, allow_pickle=True)
    assert torch.equal(run(model, "llama"), want)
    with pytest.raises(FileError, match="pickle"):
        load_peft_weights(str(tmp_path))
    assert load_peft_weights(str(tmp_path), allow_pickle=True)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    for content in ({"x": Evil()}, {"x": 3}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(FileError, match="holds more than tensors, such as code to run"):
            load_peft_weights(str(tmp_path), allow_pickle=True)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "there is no folder"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"neither {WEIGHTS} nor"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "is no JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[1]"), "has no 'peft_type'"),
    "no type": (lambda f: (f / CONFIG).write_text("{}"), "has no 'peft_type'"),
    "an unknown type": (lambda f: edit(f, peft_type="NEW"), "of the method 'NEW'"),
    "an unknown field": (lambda f: edit(f, use_doraa=True), "did you mean 'use_dora'"),
    "an option that is not here": (
        lambda f: edit(f, megatron_config={"size": 2}),
        "have megatron_config",
    ),
    "a bad value": (lambda f: edit(f, r=0), "cannot be used: r must be at least 1"),
    "cut weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:100]),
        "is damaged or no safetensors",
    ),
    "a huge config": (lambda f: (f / CONFIG).write_bytes(b" " * (16 * 2**20 + 1)), "far more than"),
}


def edit(folder: Path, **changes: Any) -> None:
    rewrite(folder, lambda tensors: None)  # without our note, as a file of PEFT
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**data, **changes}))


@pytest.mark.fault("A7")
@pytest.mark.fault("K3")
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_explained(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    saved(folder)
    change, text = BROKEN[case]
    change(folder)
    assert text in refused(folder)


@pytest.mark.fault("A7")
def test_unset_fields_of_newer_versions_are_no_obstacle(tmp_path: Path) -> None:
    want = run(saved(tmp_path), "llama")
    edit(tmp_path, some_new_option=None, another={}, third=False)
    assert torch.equal(run(PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), want)


def test_options_are_checked(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(TypeError, match=r"subfoldr is no option .* did you mean 'subfolder'"):
        PeftModel.from_pretrained(build("llama"), tmp_path, subfoldr="x")
    with pytest.raises(ValueError, match="ephemeral_gpu_offload is not available"):
        PeftModel.from_pretrained(build("llama"), tmp_path, ephemeral_gpu_offload=True)


# -- configs


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_survive_their_json(config: str, tmp_path: Path) -> None:
    one = CONFIGS[config]()
    one.save_pretrained(tmp_path)
    for again in (PeftConfig.from_pretrained(tmp_path), type(one).from_pretrained(tmp_path)):
        assert type(again) is type(one) and again.to_dict() == one.to_dict()
    data = PeftConfig.from_json_file(tmp_path / CONFIG)
    assert data["peft_version"].startswith("0.21") and "allow_unmatched" not in data
    assert list(data) == sorted(data)
    assert PeftConfig.from_peft_type(**data).to_dict() == one.to_dict()
    with pytest.raises(FileError, match=r"has no adapter_config.json"):
        PeftConfig.from_pretrained(tmp_path.parent)


# -- state dicts


def test_state_dicts_go_in_and_out(tmp_path: Path) -> None:
    model = saved(tmp_path)
    tensors = get_peft_model_state_dict(model)
    assert tensors.keys() == load_file(tmp_path / WEIGHTS).keys()
    other = get_peft_model(build("llama"), CONFIGS["lora"]()).eval()
    assert set_peft_model_state_dict(other, tensors).ok
    assert torch.equal(run(other, "llama"), run(model, "llama"))
    with pytest.raises(FileError, match="missing in the file"):
        set_peft_model_state_dict(other, dict(list(tensors.items())[1:]))
    wrong = {**tensors, next(iter(tensors)): torch.zeros(9, 9)}
    with pytest.raises(FileError, match=r"\(9, 9\) in the file"):
        set_peft_model_state_dict(other, wrong)
    set_peft_model_state_dict(other, wrong, ignore_mismatched_sizes=True)

    plain = graftwork.inject_adapter_in_model(CONFIGS["lora"](), build("llama")).eval()
    set_peft_model_state_dict(plain, tensors)
    assert torch.equal(run(plain, "llama"), run(model, "llama"))
    assert not any(n.startswith("base_model") for n in get_peft_model_state_dict(plain))
    lazy = LoraConfig(r=2, modules_to_save=["lm_head"])
    found = graftwork.inject_adapter_in_model(lazy, build("llama"), state_dict=tensors)
    assert {n for n, m in found.named_modules() if n.endswith("q_proj.adapters")}
    with pytest.raises(FileError, match="no name in state_dict belongs to a layer"):
        graftwork.inject_adapter_in_model(lazy, build("llama"), state_dict={"x": torch.zeros(1)})


@pytest.mark.fault("A4")
def test_a_resized_vocabulary_travels_with_the_adapter(tmp_path: Path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(72)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / WEIGHTS)
    assert "base_model.model.lm_head.weight" in names
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.get_input_embeddings().num_embeddings == 72
    assert torch.equal(run(again, "llama"), run(model, "llama"))


@pytest.mark.fault("C14")
def test_a_start_from_the_weight_is_written_as_a_plain_lora(tmp_path: Path) -> None:
    for start in ("pissa", "olora"):
        config = LoraConfig(r=2, init_lora_weights=start, rank_pattern={"v_proj": 3})
        model = get_peft_model(build("llama"), config).eval()
        shake(model)
        model.save_pretrained(
            tmp_path / start, path_initial_model_for_weight_conversion=str(tmp_path)
        )
        plain = PeftModel.from_pretrained(build("llama"), tmp_path / start)
        assert plain.peft_config["default"].init_lora_weights is True
        assert {row.rank for row in plain.adapters()} == {4, 6}
        torch.testing.assert_close(run(plain, "llama"), run(model, "llama"))


# -- the hub, which is a folder here


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has one repository, and what it was asked."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    folder, asked = tmp_path / "hub", []

    def download(repo: str, name: str, subfolder: str | None = None, **options: Any) -> str:
        asked.append({"repo": repo, "name": name, "subfolder": subfolder, **options})
        if repo != "someone/adapter":
            raise RepositoryNotFoundError("404", response=FakeResponse())
        path = folder / (subfolder or "") / name
        if not path.is_file():
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


class FakeResponse:
    """Enough of a response for the hub's errors."""

    headers: dict[str, str] = {}
    request = None
    status_code = 404
    text = ""


@pytest.mark.fault("A12")
def test_an_adapter_from_the_hub(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    want = run(saved(tmp_path / "hub" / "sub"), "llama")
    options = {"revision": "v1", "token": "secret", "local_files_only": True, "cache_dir": "c"}
    model = PeftModel.from_pretrained(build("llama"), "someone/adapter", subfolder="sub", **options)
    assert torch.equal(run(model, "llama"), want)
    for call in hub:
        assert call["subfolder"] == "sub" and {k: call[k] for k in options} == options
    assert PeftConfig.from_pretrained("someone/adapter", subfolder="sub").r == 2
    assert load_peft_weights("someone/adapter", subfolder="sub")
    with pytest.raises(FileError, match=r"someone/adapter has no adapter_config.json"):
        PeftModel.from_pretrained(build("llama"), "someone/adapter")
    with pytest.raises(FileError, match="someone/other is no folder here, and not to be had"):
        PeftModel.from_pretrained(build("llama"), "someone/other")


@pytest.mark.fault("A6")
def test_saving_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = get_peft_model(build("llama"), LoraConfig(r=2))
    for config in model.peft_config.values():
        config.base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # with a card that is there already


def test_uploading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            done.append(token)

        def create_repo(self, repo: str, **options: Any) -> None:
            done.append((repo, options))

        def upload_folder(self, folder_path: str, **options: Any) -> str:
            done.append((sorted(os.listdir(folder_path)), options["commit_message"]))
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert saved(tmp_path).push_to_hub("me/it", token="t", private=True) == "commit"
    assert done[0] == "t" and done[1] == ("me/it", {"private": True, "exist_ok": True})
    assert done[2] == (sorted([CONFIG, WEIGHTS, "README.md"]), "Upload adapter")


# -- the auto classes


@pytest.mark.fault("A12")
def test_the_auto_classes_need_the_folder_alone(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    for task in ("CAUSAL_LM", None):
        model = get_peft_model(base, LoraConfig(r=2, task_type=task)).eval()
        shake(model)
        folder = tmp_path / f"adapter{task}"
        model.save_pretrained(folder)
        want = run(model, "llama")
        base = model.unload()
        for cls in (AutoPeftModel, AutoPeftModelForCausalLM):
            again = cls.from_pretrained(folder)
            assert torch.equal(run(again, "llama"), want)
        assert type(again) is graftwork.PeftModelForCausalLM
        again = AutoPeftModel.from_pretrained(folder, dtype=torch.bfloat16, is_trainable=True)
        assert again.dtype == torch.bfloat16
        assert any(p.requires_grad for p in again.parameters())

    get_peft_model(build("plain"), LoraConfig(r=2, target_modules=["lin0"])).save_pretrained(
        tmp_path / "own"
    )
    with pytest.raises(FileError, match="does not say which base model"):
        AutoPeftModel.from_pretrained(tmp_path / "own")
    edit(tmp_path / "own", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(FileError, match=r"a Plain of tiny, which is not loaded from a file's word"):
        AutoPeftModel.from_pretrained(tmp_path / "own")
    with pytest.raises(OSError, match=r"is used as AutoPeftModel.from_pretrained"):
        AutoPeftModel()


@pytest.mark.fault("A8")
def test_a_classifier_comes_back_with_its_head(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "base")
    base = type(build("bert")).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS")).eval()
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=3
    )
    assert torch.equal(run(again, "bert"), run(model, "bert"))
    assert again.modules_to_save == {"classifier"}
