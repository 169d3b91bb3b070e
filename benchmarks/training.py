"""Training beside the real peft: a small language model on real texts, step by step.

    python benchmarks/training.py [--steps 20] [--methods VERA,DoRA]

stories260k learns restaurant descriptions of E2E NLG; both are in ../shared. For each method of the
table that PEFT has too, and for variants of LoRA, PEFT writes the start of an adapter into a
folder and graftwork reads it; prompts start from the same seed. Both train with AdamW on the same
batches. Where PEFT wants the
training loop to do something (add a penalty, advance a schedule), its loop does; that of graftwork
never does. Losses are means over the first and over the last batches, which are the same.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from torch import Tensor

import graftwork

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
MODEL, TEXTS = SHARED / "models" / "stories260k", SHARED / "data" / "e2e_nlg" / "devset.csv"
BATCHES, ROWS, LENGTH = 5, 4, 64  # batches, which come again and again; of each
RATE, STEPS = 2e-3, 20


@dataclass
class Case:
    """One method, with a config of the same class and fields in both libraries."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, library: Any, folder: Path) -> Any:
        """The config; experts, where the method mixes some, are written into the folder."""
        cls = getattr(library, self.kind)
        known = {f.name for f in fields(cls)}
        if "num_virtual_tokens" in known:  # where those stand is no field in PEFT
            known.discard("target_modules")
        options = {k: v for k, v in COMMON.items() if k in known}
        if self.kind == "XLoraConfig":
            options["adapters"] = experts(folder)
        return cls(**options | self.options)


COMMON = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 8}
BLOCKS = {"target_modules_bd_a": ["v_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
ROTATION = {"r": 0, "oft_block_size": 8}
TEN = {"num_virtual_tokens": 10}
# what a method of the table needs beside what is common
METHODS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 4, "deltaT": 2,
                "total_step": STEPS},
    "ADAMSS": {"r": 16, "num_subspaces": 4},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 10, "adapter_layers": 3},
    # the last block alone: PEFT's backward does not transpose C3A's blocks, so below it is wrong
    "C3A": {"block_size": 8, "layers_to_transform": [4]},
    "CARTRIDGE": TEN,
    "CPT": {"cpt_token_ids": list(range(300, 308)), "cpt_tokens_type_mask": list(range(1, 9)),
            "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.8},
    "FOURIERFT": {"n_frequency": 100},
    "FROD": {"progressbar": False},
    "IA3": {"target_modules": None},
    "LN_TUNING": {"target_modules": None},
    "MULTITASK_PROMPT_TUNING": {**TEN, "num_tasks": 2},
    "OFT": ROTATION,
    "P_TUNING": TEN,
    "POLY": {"n_tasks": 2},
    "PREFIX_TUNING": TEN,
    "PROMPT_TUNING": TEN,
    "RANDLORA": {"randlora_alpha": 16},
    "ROAD": {"group_size": 16},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"token_indices": list(range(3, 512)), "target_modules": None},
    "UNILORA": {"theta_d_length": 500},
    "VBLORA": {"vector_length": 16, "num_vectors": 32},
    "WAVEFT": {"n_frequency": 100},
    "XLORA": {"hidden_size": 64},
}  # fmt: skip
VARIANTS: dict[str, Case] = {
    name: Case(kind, options)
    for name, kind, options in (
        ("AdaMSS with ASA", "AdamssConfig",
         {"r": 16, "num_subspaces": 4, "use_asa": True, "asa_target_subspaces": 20,
          "init_warmup": 2, "final_warmup": 16, "mask_interval": 3}),
        ("COFT", "OFTConfig", {**ROTATION, "coft": True, "eps": 0.02}),
        *((name, "LoraConfig", options) for name, options in {
            "rsLoRA": {"use_rslora": True},
            "DoRA": {"use_dora": True},
            "LoRA with biases": {"lora_bias": True},
            "LoRA with modules_to_save": {"modules_to_save": ["model.norm"]},
            "orthogonal": {"init_lora_weights": "orthogonal"},
            "PiSSA": {"init_lora_weights": "pissa"},
            "OLoRA": {"init_lora_weights": "olora"},
            "MiCA": {"init_lora_weights": "mica"},
            "KaSA": {"kasa_config": {}},
            "BD-LoRA": {"use_bdlora": BLOCKS},
            **{f"VeLoRA {how}": {"velora_config": {"num_groups": 8, "init_type": how}}
               for how in ("batch_average", "batch_average_once", "random")},
            # its noise is drawn otherwise here, so it is left out, and the penalty that is of it
            "MonteCLoRA": {"monteclora_config": {"sample_scaler": 0.0, "kl_loss_weight": 0.0}},
            "aLoRA": {"alora_invocation_tokens": [261]},
        }.items()),
    )
}  # fmt: skip


def cases() -> dict[str, Case]:
    """All that both libraries train."""
    peft = importlib.import_module("peft")
    rows = {name: row.config.__name__ for name, row in graftwork.METHODS.items()}
    found = {n: Case(kind, METHODS.get(n, {})) for n, kind in rows.items() if hasattr(peft, kind)}
    return found | VARIANTS


def base() -> Any:
    """The model, always the same."""
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is not there; the texts and the model are kept in {SHARED}")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    model.config.use_cache = False  # PEFT's X-LoRA asks for that
    return model


@cache
def batches() -> list[dict[str, Tensor]]:
    """Descriptions from all over the file, as ids, cut and padded to one length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    with TEXTS.open(encoding="utf-8-sig") as file:
        texts = [row["ref"] for row in csv.DictReader(file)]
    chosen = texts[:: len(texts) // (BATCHES * ROWS)]
    found = []
    for i in range(0, BATCHES * ROWS, ROWS):
        batch = tokenizer(chosen[i : i + ROWS], padding=True, truncation=True, max_length=LENGTH,
                          return_tensors="pt")  # fmt: skip
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def experts(folder: Path) -> dict[str, str]:
    """Two LoRAs that do something, for a mixture."""
    for i in range(2):
        model = graftwork.get_peft_model(base(), graftwork.LoraConfig(r=4, task_type="CAUSAL_LM"))
        torch.manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.1) if p.requires_grad else None
        model.save_pretrained(folder / f"expert{i}")
    return {str(i): str(folder / f"expert{i}") for i in range(2)}


def train(
    model: Any,
    steps: int,
    call: dict[str, Any],
    penalty: Callable[[Any], Any] = lambda model: 0.0,
    after: Callable[[Any, int], None] = lambda model, step: None,
) -> list[float]:
    """The losses of a plain loop, with what the library wants of the loop."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], RATE)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # for the methods that draw
        optimizer.zero_grad()
        loss = model(**batches()[step % BATCHES], **call).loss + penalty(model)
        loss.backward()
        optimizer.step()
        after(model, step)
        losses.append(float(loss.detach()))
    return losses


def by_hand(model: Any) -> Any:
    """The penalties that PEFT leaves to the loop."""
    tuner = model.base_model
    names = ("_get_kasa_loss", "_get_monteclora_loss")
    return sum(getattr(tuner, name)() for name in names if hasattr(type(tuner), name))


def advance(model: Any, step: int) -> None:
    """The schedules that PEFT leaves to the loop; one counts from 1, the other from 0."""
    tuner, kind = model.base_model, model.active_peft_config.peft_type
    if kind == "ADALORA":
        tuner.update_and_allocate(step + 1)
    if kind == "ADAMSS":
        keep = type(tuner)._global_mask_to_target  # PEFT keeps one less than it is asked to
        tuner._global_mask_to_target = lambda n, *rest: keep(tuner, n + 1, *rest)
        tuner.update_and_allocate(step)


@dataclass
class Result:
    """What both libraries did with one method."""

    losses: list[float]
    theirs: list[float]
    trained: int

    @property
    def difference(self) -> float:
        """The greatest of a step."""
        return max(abs(a - b) for a, b in zip(self.losses, self.theirs, strict=True))

    @property
    def falls(self) -> bool:
        """Whether the last losses are below the first ones, here and in PEFT."""
        return all(a > b for a, b in map(ends, (self.losses, self.theirs)))


def ends(losses: list[float]) -> tuple[float, float]:
    """The mean of the first and of the last pass over the batches."""
    return mean(losses[:BATCHES]), mean(losses[-BATCHES:])


def trainable(model: Any) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def compare(case: Case, steps: int = STEPS) -> Result:
    """Train one method in both libraries, from one start."""
    peft = importlib.import_module("peft")
    tasks = case.kind in ("PolyConfig", "MultitaskPromptTuningConfig")
    call = {"task_ids": torch.tensor([0, 1, 1, 0])} if tasks else {}
    with tempfile.TemporaryDirectory() as folder:
        models = [base(), base()]
        torch.manual_seed(0)
        theirs = peft.get_peft_model(models[0], case.config(peft, Path(folder)))
        theirs.save_pretrained(folder)
        if theirs.active_peft_config.is_prompt_learning:  # a file may hold what a network made
            torch.manual_seed(0)
            ours = graftwork.get_peft_model(models[1], case.config(graftwork, Path(folder)))
        else:
            ours = graftwork.PeftModel.from_pretrained(models[1], folder, is_trainable=True)
    count = trainable(ours)
    if count != trainable(theirs):
        raise ValueError(f"{count} numbers train, and {trainable(theirs)} in PEFT")
    losses = train(ours, steps, call)
    return Result(losses, train(theirs, steps, call, by_hand, advance), count)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="training beside the real peft")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--methods", help="some of them, with commas between")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = cases()
    names = args.methods.split(",") if args.methods else list(found)
    if unknown := [name for name in names if name not in found]:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(found)}")
    print(f"{machine()}; {args.steps} steps\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name in names:
        print(line(name, compare(found[name], args.steps)), flush=True)


HEAD = ("method", "trained", "first", "last", "PEFT's first", "last", "largest difference", "falls")


def line(name: str, got: Result) -> str:
    """A row of the table."""
    losses = [f"{loss:.4f}" for losses in (got.losses, got.theirs) for loss in ends(losses)]
    falls = "yes" if got.falls else "no"
    words = [name, f"{got.trained:,}", *losses, f"{got.difference:.0e}", falls]
    return f"| {' | '.join(words)} |"


def machine() -> str:
    """Where this is measured."""
    libraries = map(importlib.import_module, ("torch", "transformers", "peft", "graftwork"))
    words = [f"{library.__name__} {library.__version__}" for library in libraries]
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {', '.join(words)}"


if __name__ == "__main__":
    main()
