"""Less work for the same training: the loss without whole logits, batches without padding, frozen
blocks run once.

    python benchmarks/less.py

Figures are of this machine, medians of interleaved runs; a bound is what the ratio may be at most.
The texts are questions and answers of Dolly, in ../shared, in the words of stories260k.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from graftwork import LoraConfig, fused_loss, get_peft_model
from graftwork.train import packing, prefix
from graftwork.train.samples import ByLength, Sample, Samples, collate

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
MODEL, TEXTS = SHARED / "models" / "stories260k", SHARED / "data" / "dolly_short" / "train.jsonl"
RUNS = 9


def llama(words: int, width: int, blocks: int) -> Any:
    """A Llama with weights of noise."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=words, hidden_size=width, intermediate_size=8 * width // 3,
            num_hidden_layers=blocks, num_attention_heads=8, max_position_embeddings=1024,
        )
    )  # fmt: skip


def adapted(words: int, width: int, blocks: int, **options: Any) -> Any:
    """With LoRA on all linear layers, in training mode."""
    base = llama(words, width, blocks)
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", **options)).train()


def interleaved(*ways: Callable[[], Any], runs: int = RUNS) -> list[float]:
    """The median seconds of each."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(runs + 1):
        for way, found in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            if turn:  # the first is a warm-up
                found.append(time.perf_counter() - began)
    return [median(found) for found in seconds]


def peak(step: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that are allocated within a step at one time, and in one tensor."""
    with torch.profiler.profile(profile_memory=True) as watched:
        step()
    sizes = [e.nbytes() for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum(sizes).max()), max(sizes)


def row(name: str, ours: float, unit: str, bound: float | None = None) -> dict[str, Any]:
    """A line of the table; PEFT has none of this, and no figure."""
    return {"name": name, "peft": None, "ours": ours, "unit": unit, "bound": bound}


def loss_rows(words: int = 32000, width: int = 128, batch: int = 4) -> list[dict[str, Any]]:
    """A step without whole logits beside one with them."""
    model = adapted(words, width, 2)
    ids = torch.randint(3, words, (batch, 128))

    def plain() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def fused() -> None:
        with fused_loss(model):
            plain()

    (most, one), (less, small) = peak(plain), peak(fused)
    seconds = interleaved(plain, fused)
    what = f"loss, vocabulary {words:,}, {batch} x 128, without whole logits / with"
    return [
        row(f"{what}: peak bytes of a step", less / most, "ratio", 1.0),
        row(f"{what}: largest tensor", small / one, "ratio", 1.0),
        row(f"{what}: time of a step", seconds[1] / seconds[0], "ratio"),
    ]


def texts(count: int = 256) -> Samples:
    """Questions with their answers as samples of 256 tokens at most."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    found = [f"{row['instruction']} {row['response']}" for row in rows]
    few = found[:: len(found) // count][:count]
    every = tokenizer(few, truncation=True, max_length=256)["input_ids"]
    return Samples([Sample(ids, ids) for ids in (np.asarray(i, dtype=np.int32) for i in every)])


def packing_rows(batch: int = 16, batches: int = 2) -> list[dict[str, Any]]:
    """A pass over some batches, padded and packed, in orders that pad much and little."""
    samples = texts()
    order = list(np.random.default_rng(0).permutation(len(samples)))
    like = list(ByLength(samples.lengths(), batch, 0))
    model = adapted(512, 128, 2, task_type="CAUSAL_LM")
    if reason := packing.why_not(model, samples, 0):
        raise SystemExit(f"this model cannot be packed: {reason}")

    def steps(order: list[int], packed: bool) -> None:
        for at in range(0, batch * batches, batch):
            items = [samples[i] for i in order[at : at + batch]]
            if not packed:
                model(**collate(items, 0)).loss.backward()
                continue
            row = packing.pack(items)
            with packing.packed(model, row.pop("lengths")):
                model(**row).loss.backward()

    found = []
    for name, given in (("in random order", order), ("sorted by length", like)):
        seconds = interleaved(lambda o=given: steps(o, False), lambda o=given: steps(o, True))
        spared = packing.saved(samples, given, batch)
        what = f"texts {name}, packed / padded"
        found += [
            row(f"{what}: tokens of an epoch", 1 - spared, "ratio", 1.0),
            row(f"{what}: time of a step", seconds[1] / seconds[0], "ratio"),
        ]
    return found


def prefix_rows(blocks: int = 8, top: int = 2, batch: int = 16) -> list[dict[str, Any]]:
    """An epoch whose frozen blocks ran before, beside one that runs them."""
    samples = texts(48)
    upper = list(range(blocks - top, blocks))
    model = adapted(512, 128, blocks, layers_to_transform=upper, task_type="CAUSAL_LM")
    found = prefix.find(model, samples, 0)
    cache = prefix.Cache(found, samples, 10**9, Path(tempfile.gettempdir()))
    order = list(ByLength(samples.lengths(), batch, 0))

    def epoch(kept: bool) -> None:
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            given = collate([samples[i] for i in rows], 0)
            if not kept:
                model(**given).loss.backward()
                continue
            with cache.used(model, torch.tensor(rows), False):
                model(**given).loss.backward()

    once, plain, later = interleaved(
        lambda: cache.fill(model, batch, 0), lambda: epoch(False), lambda: epoch(True), runs=5
    )
    what = f"LoRA in the last {top} of {blocks} blocks, those below kept / run"
    return [
        row(f"{what}: an epoch", later / plain, "ratio", 1.0),
        row(f"{what}: 3 epochs, with the pass before", (once + 3 * later) / (3 * plain), "ratio"),
    ]


def rows() -> list[dict[str, Any]]:
    """All lines."""
    transformers.logging.set_verbosity_error()
    return [*loss_rows(), *packing_rows(), *prefix_rows()]


def main() -> None:
    """Print them."""
    for found in rows():
        print(f"{found['ours']:6.2f}  {found['name']}")


if __name__ == "__main__":
    main()
