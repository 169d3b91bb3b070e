"""Everything that performance promises, beside the real peft: ``make bench``.

    python benchmarks/run.py [--quick] [--only steps many] [--name NAME] [--device cuda]

Each module of ``MODULES`` runs in a process of its own and gives its rows; their table is printed,
and written with the machine and the versions to benchmarks/results/NAME.json, with a plot to
docs/performance/NAME.svg. ``python docs/performance.py`` then writes the page. Whatever could not
run is named at the end, and the exit status is 1; a number over its bound is no failure.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from report import Result, Row, checked, plot, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, PLOTS = HERE / "results", ROOT / "docs" / "performance"
MODULES = {  # each has rows(); what it measures
    "steps": "a training step against its floor, and what it saves for the backward",
    "losses": "whether training comes out as plain LoRA",
    "forward": "one adapter that is not merged",
    "less": "the loss without logits, and packing",
    "many": "loading, switching, injection, start-up",
    "mixed": "batches of several adapters, decoding, recompilations",
    "together": "training many adapters at once",
}
ON_GPU = ("steps", "losses", "forward", "mixed")  # what --device cuda runs; others are the CPU's
PROMISED = {  # what a complete run must hold: module -> patterns of its rows
    "steps": [
        r"step / floor, width 512, fp32, dropout 0$",
        r"step / floor, width 512, fp32, dropout 0\.05$",
        r"step / floor, width 512, bf16, dropout 0$",
        r"step / floor, width 512, bf16, dropout 0\.05$",
        r"step / floor, width 1024, bf16, dropout 0$",
        r"step / floor, width 1024, bf16, dropout 0\.05$",
        r"LoRA step / full fine-tuning step, width 1024, bf16, without optimizer",
        r"LoRA step / full fine-tuning step, width 1024, bf16, with AdamW",
        r"DoRA step / LoRA step",
        r"bytes saved for backward / floor's, .* bf16, dropout 0$",
        r"bytes saved for backward / floor's, .* bf16, dropout 0\.05$",
    ],
    "losses": [
        r"losses after .* fp32",
        r"losses after .* bf16",
        r"adapters after .* fp32",
        r"adapters after .* bf16",
    ],
    "forward": [
        r"one unmerged adapter / base, forward, width 256",
        r"one unmerged adapter / base, forward, width 1024",
    ],
    "many": [
        r"load (the 500th adapter|adapter 500|adapter 100) / the 1st",  # 100 in a quick run
        r"loading 32 adapters of 224 sites",
        r"set_adapter, 224 sites",
        r"injection, 224 sites",
        r"injection, .*70B",
        r"import",
        r"graft --help",
    ],
    "mixed": [
        r"forward, 16 rows, 16 adapters",
        r"decode, 64 rows, 64 adapters",
        r"recompilations",
    ],
    "together": [
        r"train_together, 8 adapters x 64",
        r"train_together, 32 (adapters )?x 16",
    ],
}
QUICK = ROOT / "out" / "bench"  # what --quick writes, which is no result


def versions() -> dict[str, str]:
    """Of what was measured, and of what it stands on."""
    found = {"python": platform.python_version()}
    for name in ("graftwork", "peft", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git(*words: str) -> str:
    """What git says; nothing where there is none, or no repository."""
    if not shutil.which("git"):
        return ""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip()


def commit() -> str:
    """The commit of this tree; "+" where the code has been changed since."""
    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where this runs."""
    import torch

    import step

    found = {
        "cpu": step.processor(),
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "bf16 units": ", ".join(step.bf16_units()) or "none",
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found if device == "cpu" else {"gpu": torch.cuda.get_device_name()} | found


def child(module: str, out: Path, quick: bool, device: str, threads: int) -> None:
    """Run one module in this process and write its rows."""
    warnings.simplefilter("ignore")
    rows = importlib.import_module(module).rows
    import torch
    import transformers

    from graftwork.fast import heap

    heap.keep()  # for all variants; docs/performance.md says why

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    known = inspect.signature(rows).parameters
    given = {k: v for k, v in {"quick": quick, "device": device}.items() if k in known}
    out.write_text(json.dumps(checked(rows(**given), module)), encoding="utf-8")


def collect(
    modules: Iterable[str], quick: bool, device: str, threads: int
) -> tuple[list[Row], list[str]]:
    """The rows of the modules, and what went wrong."""
    rows: list[Row] = []
    wrong = []
    for module in modules:
        if not (HERE / f"{module}.py").exists():
            wrong.append(f"{module}: benchmarks/{module}.py is missing ({MODULES[module]})")
            continue
        print(f"== {module}: {MODULES[module]}", flush=True)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--child", module, str(out)]
            command += ["--device", device, "--threads", str(threads), *["--quick"][: int(quick)]]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            if device == "cpu":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            done = subprocess.run(command, env=environment)
            if done.returncode or not out.exists():
                wrong.append(f"{module}: ended with status {done.returncode}, see above")
                continue
            found = json.loads(out.read_text(encoding="utf-8"))
        print(f"{table(found)}\n({time.perf_counter() - began:.0f} s)\n", flush=True)
        rows += found
        if device == "cpu":
            wrong += [f"{module}: no row is {text!r}" for text in lacking(module, found)]
    return rows, wrong


def lacking(module: str, rows: Iterable[Row]) -> list[str]:
    """What is promised of a module, and no row of it is."""
    names = [row["name"] for row in rows]
    return [p for p in PROMISED.get(module, []) if not any(re.search(p, n) for n in names)]


def write(result: Result, path: Path) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def merged(result: Result, path: Path) -> Result:
    """A result, and what an earlier one has of other modules, in the order of ``MODULES``."""
    if not path.exists():
        return result
    old = json.loads(path.read_text(encoding="utf-8"))
    rows = [*result["rows"], *(r for r in old["rows"] if r["module"] not in result["measured"])]
    rows.sort(key=lambda r: list(MODULES).index(r["module"]))
    return result | {"rows": rows, "measured": old["measured"] | result["measured"]}


def arguments() -> argparse.Namespace:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=list(MODULES), metavar="NAME")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--name", help="of the result's file; the CPU's or GPU's name otherwise")
    parser.add_argument(
        "--commit", help="what is measured, in a copy without git", default=commit()
    )
    parser.add_argument("--no-plot", action="store_true", help="matplotlib is not needed then")
    parser.add_argument("--plot-only", metavar="FILE", help="draw one of benchmarks/results again")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.quick, args.device, args.threads)
        return
    if args.plot_only:
        data = RESULTS / args.plot_only
        plot(json.loads(data.read_text(encoding="utf-8")), PLOTS / f"{data.stem}.svg")
        return
    modules = args.only or (MODULES if args.device == "cpu" else ON_GPU)
    if args.device != "cpu" and (cpu_only := sorted(set(modules) - set(ON_GPU))):
        raise SystemExit(f"{', '.join(cpu_only)}: these measure CPUs only; leave out --device cuda")
    rows, wrong = collect(modules, args.quick, args.device, args.threads)
    if rows:
        here = machine(args.device, args.threads)
        name = args.name or re.sub(r"\W+", "-", here.get("gpu", here["cpu"]).lower()).strip("-")
        of = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "commit": args.commit}
        measured = {row["module"]: of | {"versions": versions()} for row in rows}
        result = {"machine": here, "measured": measured, "rows": rows}
        data = (QUICK if args.quick else RESULTS) / f"{name}.json"
        if args.only:
            result = merged(result, data)
        write(result, data)
        print(f"{table(result['rows'])}\n\n{data}")
        if not args.no_plot:
            picture = (QUICK if args.quick else PLOTS) / f"{name}.svg"
            plot(result, picture)
            print(picture)
    if any(r["ours"] is None for r in rows):
        print("not measured:", *sorted({r["note"] for r in rows if r["ours"] is None}), sep="\n  ")
    if wrong:
        raise SystemExit("INCOMPLETE:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()
