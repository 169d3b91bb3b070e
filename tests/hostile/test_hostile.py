"""Folders that somebody broke or made to do harm get an error of ours, run nothing, open nothing
outside, and take little memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork import LoraConfig, PeftModel, StateError, get_peft_model
from graftwork.errors import FileError
from graftwork.files.bounded import plain_name
from graftwork.files.hub import Source
from graftwork.testing.bench import shake
from graftwork.testing.entry import Small

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import CASES, CONFIG, WEIGHTS

HERE = Path(__file__).parent
WARM = (  # what imports parts of libraries at its first time
    "a pickle with code", "an archive with code", "a packed archive", "rank of a billion",
    "a trillion virtual tokens", "a classifier without end", "a prompt from elsewhere",
    "directions without end", "vectors without end",
)  # fmt: skip
MIB = 256
ALARM = 30.0  # CPU seconds: far more than any case takes, and far less than a hang


def base() -> Small:
    torch.manual_seed(0)
    return Small()


def good(folder: Path) -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["up", "down"]))
    shake(model)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """What became of each case, in one process that tries them one after another."""
    place = tmp_path_factory.mktemp("hostile")
    good(place / "good")
    (place / "warm").mkdir()
    (place / "cases").mkdir()
    for name, change in CASES.items():
        folder = place / "cases" / name
        shutil.copytree(place / "good", folder)
        change(folder)
    for name in WARM:
        shutil.copytree(place / "cases" / name, place / "warm" / name)
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile_run.py"), str(place / "good"), str(place)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[list[Any]]] = {name: [] for name in CASES}
    for line in done.stdout.splitlines():
        name, *rest = json.loads(line)
        found[name].append(rest)
    return found


@pytest.mark.fault("K1")
@pytest.mark.fault("K2")
@pytest.mark.fault("K3")
@pytest.mark.fault("K4")
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_folder_is_refused_and_does_nothing(
    case: str, tried: dict[str, list[list[Any]]]
) -> None:
    assert [how for how, *_ in tried[case]] == ["load", "trust", "inspect"]
    for how, ended, seconds, seen, mib in tried[case]:
        if how != "inspect":  # which shows what is there, and builds nothing
            assert ended.startswith("refused "), ended
        assert not ended.startswith(("raised", "changed")), f"{how}: {ended}"
        assert len(ended) < 5000
        assert not seen
        assert mib < MIB
        assert seconds < ALARM
    assert not Path("/tmp/graftwork_was_here").exists()


def test_there_are_many_of_them() -> None:
    assert len(CASES) >= 120


def test_what_was_changed_is_what_is_refused(tmp_path: Path) -> None:
    good(tmp_path)
    PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.fault("K3")
def test_the_hubs_links_and_those_within_a_folder_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "1" / "inner"
    good(snapshot)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (snapshot / WEIGHTS).rename(blobs / "0")
    (snapshot / WEIGHTS).symlink_to("../../../blobs/0")
    (snapshot / CONFIG).rename(snapshot / "other.json")
    (snapshot / CONFIG).symlink_to("other.json")
    PeftModel.from_pretrained(base(), snapshot)
    PeftModel.from_pretrained(base(), snapshot.parent, subfolder="inner")
    (tmp_path / "link").symlink_to(snapshot)
    PeftModel.from_pretrained(base(), tmp_path / "link")
    (snapshot / WEIGHTS).unlink()
    (blobs / "0").rename(tmp_path / "elsewhere")
    (snapshot / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="is a link to"):
        PeftModel.from_pretrained(base(), snapshot.parent, subfolder="inner")


@pytest.mark.fault("K3")
@pytest.mark.fault("A12")
@pytest.mark.parametrize("subfolder", ["..", "../x", "a/../../x", "/etc", "a\0b", "..\\x"])
def test_a_subfolder_stays_inside(subfolder: str, tmp_path: Path) -> None:
    good(tmp_path / "x")
    (tmp_path / "y").mkdir()
    with pytest.raises(FileError, match="leads outside of"):
        PeftModel.from_pretrained(base(), tmp_path / "y", subfolder=subfolder)
    with pytest.raises(FileError, match="leads outside of"):
        Source("user/adapter", subfolder)
    model = get_peft_model(base(), LoraConfig(target_modules=["up"]))
    with pytest.raises(FileError, match="leads outside of"):
        model.load_adapter(tmp_path / "y", "other", subfolder=subfolder)
    assert list(model.peft_config) == ["default"]


@pytest.mark.fault("K3")
@pytest.mark.parametrize("name", ["/x", "../x", "a//b", "a\0b", "a\nb", "x" * 300])
def test_an_adapters_folder_is_one_of_its_own(name: str) -> None:
    with pytest.raises(StateError, match="cannot be an adapter's name"):
        get_peft_model(Small(), LoraConfig(target_modules=["up"]), adapter_name=name)


def test_names_of_folders() -> None:
    assert all(map(plain_name, ["a", "default", "a b", "ünï", ".x", "con_1", "task-0", "x" * 255]))
    assert not any(map(plain_name, ["", ".", "..", "ü" * 200, "com1.txt"]))
