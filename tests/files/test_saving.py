"""Saving loses nothing: kills, full disks, folders without rights, two writers at once, and what
others' crashes and downloads leave.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from shapes import SHAPES, base, bits, loras, one, told

from graftwork import (
    AutoPeftModelForCausalLM,
    FileError,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
)
from graftwork.files import atomic
from graftwork.files.contents import read_header
from graftwork.files.hub import Source
from graftwork.interop.native import load_adapter
from graftwork.testing.bench import shake
from graftwork.train.bundle import NOTE, RECIPE, Place
from graftwork.train.loop import last_checkpoint
from test_trainer import run_program
from tiny import build, run

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def program(name: str, *words: str) -> Any:
    return run_program(f"files/{name}.py", *words, OMP_NUM_THREADS="1")


def unharmed(found: dict[str, Any]) -> None:
    assert not found["mixed"] and not found["unreadable"] and not found["strays"], found
    assert found["kills"] == found["old"] + found["new"] and not found["errors"], found


# -- kills


@pytest.mark.slow
def test_over_500_kills_at_random_moments_of_every_shape() -> None:
    found = program("kill_program", "random", "all", "7", "1")
    unharmed(found)
    assert found["kills"] > 500 and found["shapes"] > 70 and min(found["old"], found["new"]) > 50
    print(json.dumps(found))


@pytest.mark.slow
def test_kills_at_every_call_that_changes_a_file() -> None:
    names = "VERA,several,X-LoRA beside,in training,shards,pickle,config"
    found = program("kill_program", "every", names)
    unharmed(found)
    assert found["kills"] > 200 and found["new"] > 20
    print(json.dumps(found))


def test_kills_of_some_shapes() -> None:
    unharmed(
        found := program("kill_program", "random", "LORA,X-LoRA,several,in training", "6", "2")
    )
    assert found["kills"] == 24
    unharmed(program("kill_program", "every", "config"))


@pytest.mark.slow
def test_kills_while_a_model_in_shards_takes_the_place_of_another() -> None:
    found = program("kill_program", "merge")
    unharmed(found)
    assert found["kills"] > 20 and found["new"]


@pytest.mark.fault("A9")
@pytest.mark.slow
def test_kills_while_a_training_writes_checkpoints() -> None:
    found = program("kill_program", "trainer", "12", "3")
    assert not found["mixed"] + found["unreadable"] + found["strays"] and found["old"], found


# -- what the system refuses


def test_what_the_system_refuses_and_two_writers_at_once() -> None:
    report = program("fault_program", "6")
    for how, text in (("full", "File too large"), ("readonly", "Permission denied")):
        for name, found in report[how].items():
            assert found["status"] == 0 and found["old"] and not found["left"], f"{name}: {found}"
            said = found["error"]
            assert text in said and "What was there before is intact" in said, f"{name}: {said}"
    for name, found in report["writers"].items():
        assert found["statuses"] == [0, 0] and not found["mixed"], f"{name}: {found}"
        assert found["first"] + found["second"] > 0 and not found["left"], f"{name}: {found}"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_disk_that_is_full_at_any_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = map(one(loras(), loras(use_dora=True)), (0, 1))
    first.save_pretrained(tmp_path / "old")
    real, count = atomic._write, 0
    for folder in (tmp_path / "old", tmp_path / "new" / "deep"):
        before = names(tmp_path)
        old = PeftModel.from_pretrained(base(), folder) if folder.exists() else None
        for at in range(1, 20):
            count = 0

            def full(file: Any, data: bytes, at: int = at) -> None:
                nonlocal count
                count += 1
                if count == at:
                    file.write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(file, data)

            monkeypatch.setattr(atomic, "_write", full)
            if at > 6:  # the whole save: two adapters, a card, and what commits them
                second.save_pretrained(folder)
                break
            with pytest.raises(FileError, match=r"No space left on device.*make room"):
                second.save_pretrained(folder)
            monkeypatch.undo()
            assert names(tmp_path) == before
            if old is not None:
                assert told(PeftModel.from_pretrained(base(), folder)) == told(old)
        assert count == 6
        monkeypatch.undo()


def test_what_fails_after_the_commit_is_told_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = map(one(loras(), loras()), (0, 1))
    first.save_pretrained(tmp_path)
    real = os.replace

    def refuse(old: Any, new: Any) -> None:
        if Path(new).name == WEIGHTS:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(old, new)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FileError, match=r"is saved in .* and can be loaded .* Save it once more"):
        second.save_pretrained(tmp_path)
    monkeypatch.undo()
    for inner, name in (("", "default"), ("b", "b")):
        want = PeftModel.from_pretrained(base(), tmp_path, subfolder=inner or None)
        assert want.peft_config["default"].r == second.peft_config[name].r == 3
    # what another program writes there since then holds, and not what waits
    (tmp_path / WEIGHTS).unlink()
    peft_model = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["down"]))
    peft_model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(base(), tmp_path).peft_config["default"].r == 4
    first.save_pretrained(tmp_path, selected_adapters=["b"])
    assert PeftModel.from_pretrained(base(), tmp_path).peft_config["default"].r == 4
    assert not list(tmp_path.glob(".graftwork*"))


def test_targets_that_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    model, config = one(loras())(0), LoraConfig(r=2)
    for save in (model.save_pretrained, config.save_pretrained):
        with pytest.raises(FileError, match="file is a file; give a folder"):
            save(tmp_path / "file")
        with pytest.raises(FileError, match=r"could not be saved in .*Not a directory"):
            save(tmp_path / "file" / "deeper")
    assert names(tmp_path) == {"file"}


def test_a_card_that_cannot_be_read_is_no_obstacle(tmp_path: Path) -> None:
    model = one(loras())(0)
    (tmp_path / CARD).write_text("---\nlibrary_name: [peft\n---\nmine")
    with pytest.warns(UserWarning, match=r"the head of .*README.md cannot be read"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text().endswith("mine")
    PeftModel.from_pretrained(base(), tmp_path)


# -- others at the same time


def test_one_that_waits_for_ever_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = one(loras())(0)
    with atomic.locked(tmp_path):
        monkeypatch.setattr(atomic, "PATIENCE", 0)
        with pytest.raises(FileError, match=r"another process is writing into"):
            with atomic.locked(tmp_path, 0):
                pass
    model.save_pretrained(tmp_path)


def test_a_folder_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    kind = type(build("llama"))
    folder, written = tmp_path / "adapter", 0
    models = []
    for r in (2, 3):
        model = get_peft_model(kind.from_pretrained(tmp_path / "base"), LoraConfig(r=r))
        shake(model, seed=r)
        models.append(model.eval())
    models[0].save_pretrained(folder)
    real = PeftConfig.from_fields.__func__  # type: ignore[attr-defined]

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal written
        written += 1
        if written < 3:
            models[written % 2].save_pretrained(folder)
        return real(*args, **kwargs)

    def mixture(*args: Any, **kwargs: Any) -> Any:
        models[1].save_pretrained(folder)  # while the base model is loaded
        return load(*args, **kwargs)

    monkeypatch.setattr(PeftConfig, "from_fields", classmethod(slow))
    found = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), folder)
    assert torch.equal(
        run(found, "llama"), run(models[found.peft_config["default"].r - 2], "llama")
    )
    assert written > 2
    monkeypatch.undo()
    models[0].save_pretrained(folder)
    load = kind.from_pretrained
    monkeypatch.setattr(kind, "from_pretrained", mixture)
    found = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(run(found, "llama"), run(models[1], "llama"))


@pytest.mark.parametrize("shape", ["in training", "several", "X-LoRA"])
def test_a_file_that_takes_its_place_while_it_is_read(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (first, second) = tmp_path / "adapter", map(SHAPES[shape].saver, (0, 1))
    second(folder)
    want = SHAPES[shape].facts(folder)
    first(folder)
    real, place = os.replace, atomic.find

    def stop(old: Any, new: Any) -> None:  # after the commit, before anything has its place
        if Path(new).name not in (atomic.COMMITTED, Path(old).name + atomic.DEAD):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(old, new)

    with monkeypatch.context() as broken, pytest.raises(FileError, match="can be loaded from"):
        broken.setattr(os, "replace", stop)
        second(folder)
    shutil.copytree(folder, tmp_path / "committed")
    (staged,) = folder.glob(".graftwork-????????????????")
    every = {path for path in staged.rglob("*") if path.is_file() and path.name != CARD}
    moved = set()
    for taken in sorted(every):

        def find(where: Path, name: str, taken: Path = taken) -> Path | None:
            found = place(where, name)
            if found == taken:  # it is moved between this and its opening
                real(taken, where / name)
                moved.add(taken)
            return found

        monkeypatch.setattr(atomic, "find", find)
        assert SHAPES[shape].facts(folder) == want
        monkeypatch.undo()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "committed", folder)
    assert moved == every


# -- downloads


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "reset"), TimeoutError(), "client"])
def test_a_download_that_breaks_off(
    broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    if broken == "client":
        broken = HfHubHTTPError.__bases__[0]("peer closed connection")
    one(loras())(1).save_pretrained(tmp_path)
    model = one(loras())(0)
    before = told(model)
    for last in (CONFIG, WEIGHTS):

        def fetch(repo: str, name: str, last: str = last, **options: Any) -> str:
            if name == last:
                raise broken
            return str(tmp_path / name)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
        for name in ("default", "new"):
            with pytest.raises(FileError, match=rf"fetching {last} of me/it .* broke off.*again"):
                model.load_adapter("me/it", name)
        assert told(model) == before


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    one(loras())(1).save_pretrained(tmp_path)
    model = one(loras())(0)
    before = told(model)
    for name in (WEIGHTS, CONFIG):
        whole = (tmp_path / name).read_bytes()
        for cut in range(0, len(whole), len(whole) // 20):
            (tmp_path / name).write_bytes(whole[:cut])
            for own in ("default", "new"):
                with pytest.raises(FileError, match=r"is damaged or no|is no JSON"):
                    model.load_adapter(tmp_path, own)
        (tmp_path / name).write_bytes(whole)
    assert told(model) == before


# -- several files


def shards(folder: Path) -> Any:
    """An adapter in files as transformers' own save_pretrained writes a large one."""
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    shake(model)
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size="1KB"
    )
    assert len(split.filename_to_tensors) > 2
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model.eval()


def test_an_adapter_in_shards_is_read(tmp_path: Path) -> None:
    want = run(shards(tmp_path), "llama")
    model = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(model, "llama"), want)
    files = [load_file(path) for path in tmp_path.glob("adapter_model-*")]
    every = {name: tensor for own in files for name, tensor in own.items()}
    assert bits(load_peft_weights(str(tmp_path))) == bits(every)
    assert len(read_header(Source(tmp_path))[0]) == len(every)
    os.rename(tmp_path / "model.safetensors.index.json", tmp_path / f"{WEIGHTS}.index.json")
    assert bits(load_peft_weights(str(tmp_path))) == bits(every)
    plain = build("llama")
    load_adapter(plain, str(tmp_path))
    assert torch.equal(run(plain.eval(), "llama"), want)
    model.save_pretrained(tmp_path)  # one file, which is read from then on
    assert bits(load_file(tmp_path / WEIGHTS)) == bits(every)


def wrong(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    change(data["weight_map"])
    index.write_text(json.dumps(data))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "outside": (
        lambda f: wrong(f, lambda m: m.update({next(iter(m)): "../adapter_model.safetensors"})),
        "names files outside of its folder",
    ),
    "a pickle": (
        lambda f: wrong(f, lambda m: m.update({next(iter(m)): "adapter_model.bin"})),
        "which are no files of an adapter's weights",
    ),
    "missing": (
        lambda f: next(f.glob("adapter_model-00002*")).unlink(),
        "lacks adapter_model-00002",
    ),
    "another save": (
        lambda f: save_file({"x": torch.ones(1)}, next(f.glob("adapter_model-00001*"))),
        "are not of one save",
    ),
    "a tensor too much": (
        lambda f: wrong(f, lambda m: m.update(more=next(iter(m.values())))),
        "do not both have more",
    ),
    "no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "is no index"),
    "a list": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "is no index",
    ),
    "of a model": (
        lambda f: wrong(f, lambda m: (m.clear(), m.update(x="model-00001-of-00001.safetensors"))),
        "has neither adapter_model.safetensors nor",
    ),
}


@pytest.mark.fault("K3")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_shards_are_explained(case: str, tmp_path: Path) -> None:
    shards(tmp_path)
    change, text = BROKEN[case]
    change(tmp_path)
    with pytest.raises(FileError, match=text):
        PeftModel.from_pretrained(build("llama"), tmp_path)


# -- what a training writes


def test_what_a_killed_training_leaves_is_no_obstacle(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "out"))
    place.work.mkdir()
    (place.work / f".{RECIPE}.1.tmp").write_text("")
    place.check_free(overwrite=False)
    for step, state in ((1, "{}"), (2, '{"epoch"')):  # the second one was killed while writing
        folder = place.work / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    (place.work / "checkpoint-3").mkdir()
    last = last_checkpoint(place.work)
    assert last is not None and last.name == "checkpoint-1"


@pytest.mark.parametrize("able", [True, False])
def test_a_finished_training_replaces_another_one(
    able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not able:
        monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    place = Place(str(tmp_path / "out"))
    for content in ("first", "second"):
        made = place.work / "result"
        made.mkdir(parents=True)
        (made / NOTE).write_text(content)
        place.finish(made)
        assert (place.output / NOTE).read_text() == content
        assert names(tmp_path) == {"out", f"out/{NOTE}"}
    shutil.rmtree(place.output)
