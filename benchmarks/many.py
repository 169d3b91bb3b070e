"""What many adapters cost: injecting, loading, switching; and how long the start takes.

    python benchmarks/many.py [--quick]

The model has Llama's shape: 32 blocks of 7 linear layers, so 224 sites, and small widths, so that
the numbers are the library's own. The real peft stands beside where that is installed. Each number
is a median; the two libraries take turns.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

Row = dict[str, Any]  # name, peft (or None), ours, unit, and the bound that the issue sets for ours
NAMES = ("graftwork", *(["peft"] if importlib.util.find_spec("peft") else []))
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def llama(blocks: int = 32, width: int = 64, meta: bool = False, **more: Any) -> LlamaForCausalLM:
    """A model of 7 sites a block."""
    shape = {"intermediate_size": 2 * width, "num_attention_heads": 4, "vocab_size": 256, **more}
    config = LlamaConfig(hidden_size=width, num_hidden_layers=blocks, **shape)
    with torch.device("meta" if meta else "cpu"):
        return LlamaForCausalLM(config)


def llama_70b() -> LlamaForCausalLM:
    """The shape of Llama-2-70B, on the meta device."""
    return llama(
        80, 8192, True, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=32000,
    )  # fmt: skip


def libraries() -> dict[str, Any]:
    """This library, and the real peft where it is installed."""
    return {name: importlib.import_module(name) for name in NAMES}


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def row(name: str, found: dict[str, list[float]], unit: str, bound: float, by: float = 1) -> Row:
    """The medians of both libraries."""
    peft, ours = found.get("peft"), found["graftwork"]
    return {
        "name": name,
        "peft": median(peft) * by if peft else None,
        "ours": median(ours) * by,
        "unit": unit,
        "bound": bound,
    }


def relative(name: str, found: dict[str, list[float]], bound: float) -> Row:
    """The times of both libraries as multiples of peft's; seconds where there is no peft."""
    if "peft" not in found:
        return row(f"{name}, s", found, "s", float("inf"))
    whole = median(found["peft"])
    made = row(f"{name}, relative to PEFT ({whole:.3g} s)", found, "x", bound, 1 / whole)
    return made


def injections(times: int = 9) -> list[Row]:
    """Injection of 224 sites beside PEFT's, and of 560 sites of a 70B shape on the meta device."""
    rows: list[Row] = []
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for made in (llama, llama_70b):
        found = {name: [] for name in NAMES}
        for _ in range(times if made is llama else max(1, times // 3)):
            for name, library in libraries().items():
                base, config = made(), library.LoraConfig(r=8, target_modules="all-linear")
                gc.collect()
                found[name].append(seconds(lambda: library.get_peft_model(base, config)))  # noqa: B023
        if made is llama:
            rows.append(relative("injection, 224 sites", found, 1 / 3))
        else:
            rows.append(row("injection, 560 sites of a 70B shape on meta", found, "s", 1.0))
    return rows


def loads(library: Any, blocks: int, count: int) -> Iterator[float]:
    """How long each of ``count`` adapters takes to load into one model."""
    with tempfile.TemporaryDirectory() as folder:
        config = library.LoraConfig(r=8, target_modules=LINEAR)
        library.get_peft_model(llama(blocks), config).save_pretrained(folder)
        model = library.PeftModel.from_pretrained(llama(blocks), folder, adapter_name="first")
        gc.collect()
        for i in range(count):
            yield seconds(lambda: model.load_adapter(folder, f"a{i}"))  # noqa: B023


def loading(count: int = 32, times: int = 1) -> list[Row]:
    """Loading 32 adapters of 224 sites; both libraries take turns, adapter by adapter."""
    total: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(times):
        runs = [loads(library, 32, count) for library in libraries().values()]
        for name, took in zip(
            NAMES, map(sum, zip(*zip(*runs, strict=True), strict=True)), strict=True
        ):
            total[name].append(took)
    return [relative(f"loading {count} adapters of 224 sites", total, 1 / 15)]


def growing(count: int = 500, sites: int = 7) -> list[Row]:
    """The time to load the last of 500 adapters by that to load the first, of a small model."""
    taken = list(loads(importlib.import_module("graftwork"), sites // 7, count))
    first, last = median(taken[1:10]), median(taken[-9:])
    name = f"time to load adapter {count} / the 1st, {sites} sites"
    return [{"name": name, "peft": None, "ours": last / first, "unit": "x", "bound": 1.3}]


def switching(adapters: int = 4, times: int = 45) -> list[Row]:
    """``set_adapter`` at 224 sites."""
    models = {}
    for name, library in libraries().items():
        config = library.LoraConfig(r=8, target_modules=LINEAR)
        models[name] = library.get_peft_model(llama(), config, adapter_name="a0")
        for i in range(1, adapters):
            models[name].add_adapter(f"a{i}", config)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for i in range(times):
        for name, model in models.items():
            found[name].append(seconds(lambda: model.set_adapter(f"a{i % adapters}")))  # noqa: B023
    title = f"set_adapter, 224 sites, {adapters} adapters"
    return [row(title, found, "ms", 1.0, 1000)]


def starting(times: int = 9) -> list[Row]:
    """What ``from graftwork import ...`` takes beyond ``import torch``, and ``graft --help``."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(times):
        for name in NAMES:
            code = (
                "import torch, time; began = time.perf_counter(); "
                f"from {name} import LoraConfig, get_peft_model; print(time.perf_counter() - began)"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            found[name].append(float(done.stdout))
    program = Path(sys.executable).with_name("graft")
    command = [str(program)] if program.is_file() else [sys.executable, "-m", "graftwork.cli"]
    helped = [
        seconds(lambda: subprocess.run([*command, "--help"], capture_output=True, check=True))
        for _ in range(times)
    ]
    return [
        row("import LoraConfig, get_peft_model beyond torch", found, "s", 0.1),
        row("graft --help", {"graftwork": helped}, "s", 0.3),
    ]


def rows(quick: bool = False) -> list[Row]:
    """All rows; ``quick``: fewer repetitions and 100 adapters instead of 500."""
    few = {"times": 3} if quick else {}
    return [
        *injections(**few),
        *loading(),
        *growing(100 if quick else 500),
        *switching(),
        *starting(**few),
    ]


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'':<62} {'PEFT':>10} {'here':>10} {'at most':>10}")
    for r in rows(wanted.quick):
        peft = "-" if r["peft"] is None else f"{r['peft']:.3g}"
        print(f"{r['name']:<62} {peft:>10} {r['ours']:>10.3g} {r['bound']:>10.3g} {r['unit']}")


if __name__ == "__main__":
    main()
