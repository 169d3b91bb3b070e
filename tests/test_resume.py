"""20 steps are 10 steps, a stop, and 10 more from what was saved: bit for bit, every method."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from graftwork import AdaLoraConfig, AdamssConfig, LoraConfig, PeftModel
from graftwork.optim.lorafa import create_lorafa_optimizer
from graftwork.optim.loraplus import create_loraplus_optimizer
from graftwork.optim.riemannian import create_riemannian_optimizer
from graftwork.testing.entry import IDS, Entry
from specs import METHODS, Case

HERE = Path(__file__).parent
HALF = 10
DROPOUT = 0.25
SCHEDULED = {  # whose schedules have something to do before, at and after the stop
    "adalora_stages": Case(
        lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=3, tfinal=4, deltaT=2)
    ),
    "adalora_late": Case(
        lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=12, tfinal=2, deltaT=3)
    ),
    "adamss_asa": Case(
        lambda: AdamssConfig(
            r=6, num_subspaces=3, subspace_rank=2, use_asa=True, asa_target_subspaces=5,
            init_warmup=3, final_warmup=16, mask_interval=2,
        )
    ),
}  # fmt: skip
# Arrow has nothing of its own that trains, and 3 does not divide the layers of the small model
CASES = {n: c for n, c in {**METHODS, **SCHEDULED}.items() if n not in ("arrow", "qalora_3")}


def entry_of(name: str) -> Entry:
    case = CASES[name]
    return Entry(case.config, case.kinds, case.call, case.other, case.setup, case.model, case.ends)


def config_of(entry: Entry) -> Any:
    """The method with every dropout that it has, so that the random numbers matter."""
    config = entry.at()
    for one in fields(config):
        if "dropout" in one.name and isinstance(getattr(config, one.name), float):
            setattr(config, one.name, DROPOUT)
    return config


def begun(entry: Entry) -> Any:
    """The model of two blocks with the method, as it starts."""
    torch.manual_seed(3)
    model = entry.setup.attach(entry.base(), config_of(entry), "a0", IDS)
    model.set_adapter("a0")
    return model.train()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """Of all tensors of the adapter: which of them train, a schedule may change."""
    own = [p for n, p in model.named_parameters() if ".adapters." in n and p.is_floating_point()]
    return torch.optim.AdamW(own, lr=0.03)


def train(model: Any, optimizer: torch.optim.Optimizer, entry: Entry, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = (IDS + step) % 12
        loss = model(ids, **entry.call).square().mean()
        loss = loss if isinstance(loss, Tensor) else torch.zeros(())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resume(
    model: Any, entry: Entry, saved: dict[str, Any], make: Any = optimizer_of
) -> list[float]:
    """The other half of a training, by an optimizer that goes on where the saved one was."""
    model.set_adapter("a0")
    optimizer = make(model.train())
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    torch.set_rng_state(saved["random"])
    return train(model, optimizer, entry, range(HALF, 2 * HALF))


def same(first: Any, second: Any) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert not [n for n in one if not torch.equal(one[n], other[n])]
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (first, second)]
    assert trains[0] == trains[1]


def compare(entry: Entry, folder: Path, make: Any = optimizer_of) -> None:
    """A training that goes on is a training that was stopped and resumed."""
    whole = begun(entry)
    optimizer = make(whole)
    first = train(whole, optimizer, entry, range(HALF))
    whole.save_pretrained(folder)
    saved = {"optimizer": copy.deepcopy(optimizer.state_dict()), "random": torch.get_rng_state()}
    want = train(whole, optimizer, entry, range(HALF, 2 * HALF))
    assert len({*first, *want}) > HALF  # it moves

    again = entry.loaded(str(folder), is_trainable=True)
    assert resume(again, entry, saved, make) == want
    same(again, whole)
    # in place, from where another training has come to, as a trainer does
    again.load_adapter(folder / "a0", "a0", is_trainable=True)
    assert resume(again, entry, saved, make) == want
    same(again, whole)


@pytest.mark.fault("A9")
@pytest.mark.fault("C10")
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_ten_and_ten(name: str, tmp_path: Path) -> None:
    compare(entry_of(name), tmp_path)


def lora_fa(model: Any) -> Any:
    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.03, weight_decay=0.01)


def lora_plus(model: Any) -> Any:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4)


def riemannian(model: Any) -> Any:
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.01)


@pytest.mark.fault("A9")
@pytest.mark.parametrize("make", [lora_fa, lora_plus, riemannian])
def test_the_optimizers_of_loras_go_on_too(make: Any, tmp_path: Path) -> None:
    case = Case(lambda: LoraConfig(r=4, lora_alpha=8, lora_dropout=DROPOUT))
    compare(Entry(case.config, case.kinds), tmp_path, make)


PROGRAM = """
import sys, torch
from pathlib import Path
import test_resume as own

folder, out = Path(sys.argv[1]), {}
for name in sys.argv[2:]:
    entry = own.entry_of(name)
    again = entry.loaded(str(folder / name), is_trainable=True)
    saved = torch.load(folder / name / "state.pt")
    out[name] = own.resume(again, entry, saved), again.state_dict()
torch.save(out, folder / "resumed.pt")
"""


@pytest.mark.fault("A9")
def test_another_process_goes_on(tmp_path: Path) -> None:
    """Nothing that training goes on from is left in memory alone."""
    names, wanted = ["dora", "adalora_stages", "adamss_asa", "pvera_random", "monteclora"], {}
    for name in names:
        entry = entry_of(name)
        whole = begun(entry)
        optimizer = optimizer_of(whole)
        train(whole, optimizer, entry, range(HALF))
        whole.save_pretrained(tmp_path / name)
        state = {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        torch.save(state, tmp_path / name / "state.pt")
        losses = train(whole, optimizer, entry, range(HALF, 2 * HALF))
        wanted[name] = losses, whole.state_dict()
    paths = [str(HERE.parent / "src"), str(HERE)]
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
    )
    found = torch.load(tmp_path / "resumed.pt")
    for name, (losses, tensors) in wanted.items():
        assert found[name][0] == losses, name
        assert tensors.keys() == found[name][1].keys()
        assert all(torch.equal(tensors[n], found[name][1][n]) for n in tensors)


def test_what_a_schedule_has_stopped_is_not_woken_by_switching(tmp_path: Path) -> None:
    entry = entry_of("adamss_asa")
    model = begun(entry)
    model.save_pretrained(tmp_path)
    optimizer = optimizer_of(model)
    before = [p for p in model.parameters() if p.requires_grad]
    train(model, optimizer, entry, range(2 * HALF))
    stopped = [p for p in before if not p.requires_grad]
    assert 0 < len(stopped) < len(before)
    values = [p.clone() for p in stopped]
    model.set_adapter("a0")
    train(model, optimizer, entry, range(2))
    assert all(torch.equal(p, value) for p, value in zip(stopped, values, strict=True))
    assert not any(p.requires_grad for p in stopped)
    model.load_adapter(tmp_path / "a0", "a0", is_trainable=True)  # of before anything was stopped
    assert all(p.requires_grad for p in before)


@pytest.mark.slow
@pytest.mark.fault("A9")
@pytest.mark.filterwarnings("ignore")  # of the trainer's own
@pytest.mark.parametrize("name", ["adamss_asa", "pvera_random", "monteclora"])
def test_a_trainer_resumes_schedules_and_draws(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 64, (12, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(folder: str) -> Any:
        config = config_of(entry_of(name))
        config.target_modules, config.task_type = {"q_proj", "down_proj"}, "CAUSAL_LM"
        torch.manual_seed(3)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), per_device_train_batch_size=2, max_steps=12,
            save_steps=6, report_to=[], learning_rate=0.01, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = PeftModel(tiny.build("llama"), config)
        return Trainer(model=model, args=arguments, train_dataset=rows)

    whole, again = trainer("first"), trainer("second")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-6"))
    same(again.model, whole.model)
