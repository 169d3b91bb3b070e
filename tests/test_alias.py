"""Standing in for peft: the alias, native adapters of transformers, unmodified programs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.dependency_versions_table import deps

from test_trainer import HERE, run_program, without_peft  # noqa: F401 - a fixture
from tiny import build

IMPLEMENTATIONS = [True, False] if importlib.util.find_spec("peft") else [False]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("installed", IMPLEMENTATIONS)
@pytest.mark.parametrize("first", ["graftwork", "transformers"])
def test_the_alias_is_peft_for_transformers_and_accelerate(
    first: str, installed: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    site = None if installed else request.getfixturevalue("without_peft")
    report = run_program("alias_program.py", first, str(tmp_path), site=site)
    least = deps["peft"].rpartition(">=")[2]
    assert report["version"] == max("0.21.2", least), "transformers refuses an older one"
    assert report["module_version"] == report["version"]
    for fact in ("spec", "same", "is_lora", "available", "accelerate"):
        assert report[fact], fact
    for name, (effect, native, wrapped, off, keys) in report["native"].items():
        assert effect > 1e-3 and max(native, wrapped, off) < 1e-5 and keys == [], name
    assert "did you mean 'v_proj'" in report["lenient"][0]
    assert "It has no effect" in report["lenient"][0]
    assert "graftwork" in report["absent_module"] and "PrefixTuningConfig" in report["absent"]


@pytest.mark.slow
@pytest.mark.parametrize("installed", IMPLEMENTATIONS)
def test_the_quickstart_runs_unchanged_as_peft(
    installed: bool, base_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    site = None if installed else request.getfixturevalue("without_peft")
    program = [str(HERE / "quickstart.py"), str(base_folder), str(tmp_path / "lora_model")]
    result = run_module("graftwork.as_peft", *program, site=site)
    assert result["library"] == "graftwork" and result["same"]
    assert result["losses"][-1] < result["losses"][0]
    if installed:  # the same program with the real peft
        theirs = run_program("quickstart.py", *program[1:])
        assert theirs["library"] == "peft"


def test_the_quickstart_runs_word_for_word_with_the_other_name(
    base_folder: Path, tmp_path: Path
) -> None:
    text = (HERE / "quickstart.py").read_text().replace("from peft import", "from graftwork import")
    (tmp_path / "program.py").write_text(text)
    result = run_program(str(tmp_path / "program.py"), str(base_folder), str(tmp_path / "lora"))
    assert result["library"] == "graftwork" and result["same"]


def run_module(module: str, *arguments: str, site: Path | None = None) -> Any:
    paths = [str(HERE.parent / "src"), str(HERE), *([str(site)] if site else [])]
    command = [sys.executable, *(["-S"] if site else []), "-m", module, *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_it_refuses_when_the_real_peft_is_there_already() -> None:
    pytest.importorskip("peft", reason="needs the real peft")
    code = """
import peft, graftwork
try:
    graftwork.as_peft()
except graftwork.GraftworkError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the real peft has been imported already" in done.stdout
    assert "python -m graftwork.as_peft" in done.stdout


def test_wrong_usage_of_the_runner_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graftwork.as_peft"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage:" in done.stderr
