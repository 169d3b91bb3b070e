"""transformers' Trainer: with the real peft installed or not, whichever library comes first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def without_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with everything but peft."""
    folder = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith("peft") and not entry.name.endswith(".pth"):
            (folder / entry.name).symlink_to(entry)
    return folder


def run_program(name: str, *arguments: str, site: Path | None = None, **env: str) -> Any:
    """The last line that a program prints, as JSON."""
    paths = [str(HERE.parent / "src"), str(HERE), *([str(site)] if site else [])]
    options = ["-S"] if site else []
    done = subprocess.run(
        [sys.executable, *options, str(HERE / name), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


CASES = [
    ("lora", "graftwork", True),
    ("lora", "graftwork", False),
    ("lora", "transformers", True),
    ("lora", "transformers", False),
    ("adalora", "graftwork", False),
    ("ia3", "graftwork", False),
]


@pytest.mark.slow
@pytest.mark.parametrize("method, first, installed", CASES)
def test_trains_checkpoints_resumes_and_reloads_the_best(
    method: str, first: str, installed: bool, tmp_path: Path, without_peft: Path
) -> None:
    if installed:
        pytest.importorskip("peft", reason="needs the real peft")
    site = None if installed else without_peft
    result = run_program("trainer_program.py", first, method, str(tmp_path), site=site)
    assert result["equal"], "10 steps, resume, 10 steps are not 20 steps bit for bit"
    assert result["loss"] == pytest.approx(result["best_loss"], rel=1e-5)
    assert result["peft"] == installed
    names = result["files"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names.keys()
    assert not {"model.safetensors", "pytorch_model.bin"} & names.keys()
    assert names["adapter_model.safetensors"] < 40_000  # the base model has 120 kB
    assert any(n.startswith("training_state-") for n in names) == (method == "adalora")
