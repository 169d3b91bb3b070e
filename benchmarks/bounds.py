"""What the rows that lie near their bounds must cost at least on this machine.

    python benchmarks/bounds.py

Each line has a floor that no code can be below: factors are read once, the base runs once, a step
has the frozen forward and the gradient of its input. Beside it is what was measured in the same
run, and how long some parts of that take by Python's profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import re
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import transformers

import graftwork
import mixed
import step
import together
from graftwork import Run, train_together
from graftwork.engine.tree import parts
from graftwork.fast import heap

ROUNDS = 11
Runs = dict[str, Callable[[], Any]]
# what a run beyond the base consists of -> the functions, as the profiler of Python knows them
THIN = ("bmm", "baddbmm_", "index_add_", "index_select")
DECODING = {"products of factors": THIN, "seeing that nothing was changed": ("same", "unwritten")}
TRAINING = {"products of factors": THIN, "AdamW and norms": ("_fused_adamw_", "norms")}


def milliseconds(runs: Runs) -> dict[str, float]:
    """Medians of interleaved rounds."""
    times = step.interleaved(runs, ROUNDS)
    return {name: 1e3 * median(each) for name, each in times.items()}


def spent(profiler: cProfile.Profile, parts: dict[str, tuple[str, ...]], runs: int) -> str:
    """Milliseconds of a run in each of the parts."""
    known: Any = pstats.Stats(profiler)
    found = []
    for part, names in parts.items():
        each = [of[3] for (_, _, name), of in known.stats.items() if _short(name) in names]
        found.append(f"{part} {1e3 * sum(each) / runs:.1f} ms")
    return ", ".join(found)


def _short(name: str) -> str:
    """``bmm`` of ``<built-in method torch.bmm>``, and so on."""
    match = re.search(r"method '?([\w.]+)", name)
    return (match[1] if match else name).rpartition(".")[2]


def decode() -> str:
    """A token for each of 64 rows with adapters of their own: their factors have to be read."""
    shape = mixed.SHAPES[-1]
    model = shape.build(graftwork)
    plain = mixed.LlamaForCausalLM(model.config).eval()
    names = [f"a{i}" for i in range(len(shape.ranks))]
    ids = torch.randint(0, plain.config.vocab_size, (len(names), shape.tokens))
    every = [p for _, part in parts(model.get_base_model()) for p in part.parameters()]
    numbers = torch.empty(sum(p.numel() for p in every)).normal_()
    with torch.no_grad():
        found = milliseconds(
            {
                "base": lambda: plain(input_ids=ids),
                "ours": lambda: model(input_ids=ids, adapter_names=names),
                "read": numbers.sum,
            }
        )
        with cProfile.Profile() as profiler:
            for _ in range(ROUNDS):
                model(input_ids=ids, adapter_names=names)
    return (
        f"decode: base {found['base']:.0f} ms; {numbers.nbytes / 1e6:.0f} MB of factors are read "
        f"in {found['read']:.0f} ms, so at least {1 + found['read'] / found['base']:.2f}; "
        f"here {found['ours'] / found['base']:.2f} (bound {shape.bound}): "
        + spent(profiler, DECODING, ROUNDS)
    )


def several() -> list[str]:
    """Runs that learn together: the base has to run once for all of them."""
    lines = []
    for adapters, tokens, bound in together.CASES:
        data = together.batches(tokens)
        base = together.base(256, 8).requires_grad_(False)
        rows = torch.cat([data[i % len(data)]["input_ids"] for i in range(adapters)])
        embeds = base.get_input_embeddings()(rows).detach().requires_grad_()

        def floor(base: Any = base, embeds: Any = embeds, rows: Any = rows) -> None:
            base(inputs_embeds=embeds, labels=rows, use_cache=False).loss.backward()
            embeds.grad = None

        with together.alone(together.base(256, 8), data) as one:
            found = milliseconds({"floor": floor, "alone": lambda one=one: one(0)})
        most = adapters * found["alone"] / found["floor"]
        got = together.ratio(256, 8, adapters, tokens, ROUNDS)
        profiler = cProfile.Profile()
        runs = [Run(f"p{i}", together.config(), steps=ROUNDS) for i in range(adapters)]
        model = together.base(256, 8)
        profiler.runcall(train_together, model, runs, data)
        lines.append(
            f"train_together, {adapters} x {tokens}: alone {found['alone']:.1f} ms each, the base "
            f"for all {found['floor']:.0f} ms, so at most {most:.2f}; here {got:.2f} "
            f"(bound {bound:g}): {spent(profiler, TRAINING, ROUNDS)}"
        )
    return lines


def full() -> list[str]:
    """LoRA beside full fine-tuning: a step has the floor, and full fine-tuning's is what it is."""
    lines = []
    dtypes = ["float32", *(["bfloat16"] if step.bf16_units() else [])]
    for dtype in dtypes:
        kinds = ["floor", "ours", "full", "ours+adamw", "full+adamw"]
        result = step.measure(step.shape(1024, dtype), ROUNDS, kinds, bytes_too=False)
        for of, bound in (("", 0.80), ("+adamw", 0.65)):
            least, got = result.of("floor", f"full{of}"), result.of(f"ours{of}", f"full{of}")
            name = "with AdamW" if of else "without optimizer"
            lines.append(
                f"LoRA / full fine-tuning, width 1024, {dtype}, {name}: the floor alone is "
                f"{least:.2f}; here {got:.2f} (bound {bound} in bf16)"
            )
    return lines


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    heap.keep()  # for all variants; docs/performance.md says why
    print(f"torch {torch.__version__}, {step.processor()}, {threads} threads, {ROUNDS} rounds")
    print(decode(), flush=True)
    for line in (*several(), *full()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
