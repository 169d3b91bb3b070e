"""Several trainings in one pass beside the same ones after another.

    python benchmarks/together.py

A Llama-shaped model learns with LoRA of rank 8 on all linear layers and AdamW, gradients clipped to
the norm 1: 8 adapters with 64 tokens each in a step, and 32 with 16. A plain loop over one adapter
takes turns with ``train_together``; medians of the steps, and of the ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graftwork import LoraConfig, Run, get_peft_model, train_together

VOCABULARY = 4096
CASES = ((8, 64, 3.0), (32, 16, 6.0))  # adapters, tokens of each in a step, how much faster


def base(width: int, layers: int) -> Any:
    """A model, always with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 43 // 16,
        num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches(tokens: int) -> list[dict[str, Any]]:
    """Rows of random tokens, one a batch."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (8, 1, tokens), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def config() -> LoraConfig:
    """What each adapter is."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


@contextmanager
def alone(model: Any, data: list[dict[str, Any]]) -> Iterator[Any]:
    """A function that does one step of a plain loop."""
    model = get_peft_model(model, config()).train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3)

    def step(number: int) -> None:
        model(**data[number % len(data)], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    yield step
    model.unload()


def ratio(width: int, layers: int, adapters: int, tokens: int, rounds: int) -> float:
    """How many times faster all adapters together are than one after another."""
    data, model = batches(tokens), base(width, layers)
    found: list[float] = []
    with alone(base(width, layers), data) as step:
        marks: list[float] = []

        def turn(number: int, _: Any) -> None:
            """After each step of all adapters: as many steps of one as take a while."""
            marks.append(time.perf_counter())
            times = []
            for i in range(3):
                start = time.perf_counter()
                step(number * 3 + i)
                times.append(time.perf_counter() - start)
            if len(marks) > 1:  # the first step is a warm-up
                found.append(adapters * median(times) / (marks[-1] - began[-1]))
            began.append(time.perf_counter())

        began: list[float] = [time.perf_counter()]
        runs = [Run(f"r{i}", config(), seed=i, steps=rounds + 1) for i in range(adapters)]
        train_together(model, runs, data, on_step=turn)
    return median(found)


def rows(width: int = 256, layers: int = 8, rounds: int = 9) -> list[dict[str, Any]]:
    """The measurements, as ``make bench`` collects them."""
    return [
        {
            "name": f"train_together, {adapters} adapters x {tokens} tokens, "
                    "to one after another",
            "peft": None,
            "ours": ratio(width, layers, adapters, tokens, rounds),
            "unit": "x",
            "bound": bound,
        }
        for adapters, tokens, bound in CASES
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    for row in rows(given.width, given.layers, given.rounds):
        print(f"{row['name']:<70} {row['ours']:.2f}{row['unit']}  (at least {row['bound']:g})")


if __name__ == "__main__":
    main()
