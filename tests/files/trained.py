"""A training with checkpoints, for kill_program.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import beside, told

from graftwork import AdaLoraConfig, PeftModel, get_peft_model
from graftwork.train.loop import last_checkpoint
from tiny import build

STEPS = 4


def train(folder: Path) -> None:
    """Four steps with a checkpoint after each, from the newest whole one on."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=STEPS,
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    model = get_peft_model(build("llama"), config)
    ids = torch.arange(48).view(8, 6)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_strategy="no", learning_rate=0.01,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def read(folder: Path) -> dict[int, Any]:
    """What each checkpoint holds that a training can go on from, and each that has an adapter."""
    found, last = {}, last_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        whole = (path / "adapter_config.json").exists() or path == last
        if not whole and not list(path.glob(".graftwork-*")):
            continue  # the training was killed before
        try:
            model = PeftModel.from_pretrained(build("llama"), path, is_trainable=True)
        except RuntimeError as error:
            assert "no adapter folder" in str(error) and path != last, error
            continue
        schedule = model.base_model.switch.schedules["default"]
        found[int(path.name.rpartition("-")[2])] = told(model), schedule.step, beside(path)
    return found
