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
import torch

import graftwork
import training

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


@pytest.mark.fault("A9")
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


def schedules() -> dict[str, training.Case]:
    """Methods with a penalty or a schedule, whose schedule ends before the sixth step."""
    variants = training.VARIANTS
    adalora = {"total_step": 6, "tinit": 1, "tfinal": 1, "deltaT": 1}
    adamss = {"init_warmup": 1, "final_warmup": 4, "mask_interval": 1}
    return {
        "kasa": variants["KaSA"],
        "adalora": training.Case("AdaLoraConfig", training.METHODS["ADALORA"] | adalora),
        "coft": variants["COFT"],
        "adamss": training.Case("AdamssConfig", variants["AdaMSS with ASA"].options | adamss),
    }


@pytest.mark.fault("C10")
@pytest.mark.slow
@pytest.mark.skipif(not training.MODEL.is_dir(), reason="the model and the texts are in ../shared")
@pytest.mark.parametrize("method", schedules())
def test_penalties_and_schedules_need_nothing_but_the_trainer(method: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    config = schedules()[method].config(graftwork, tmp_path)
    model: Any = graftwork.get_peft_model(training.base(), config)
    batch = training.batches()[0]
    schedule = model.base_model.switch.schedules["default"]
    with torch.no_grad():
        task, penalty = float(model.eval()(**batch).loss), schedule.penalty()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=1, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, lambda rows: rows[0], train_dataset=[batch] * 6)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(task + float(penalty or 0), abs=2e-4)
    assert losses[-1] < losses[0] and schedule.step == 6
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    if method in ("kasa", "adalora"):
        assert penalty > 0.01
    if method == "adalora":  # from rank 6 to rank 3 at 10 layers
        assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 30
    if method == "coft":  # ||Q|| has come to its bound and not beyond
        norms = torch.stack([2**0.5 * v.norm(dim=1).max() for v in trained])
        radius = 0.02 / len(trained[0]) ** 0.5
        assert norms.max() == pytest.approx(radius, rel=1e-4)
    if method == "adamss":  # 20 of the 40 clusters train, each with an A and a B
        assert len(trained) == 40
