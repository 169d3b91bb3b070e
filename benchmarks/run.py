"""Everything that performance promises, beside the real peft: ``make bench``.

    python benchmarks/run.py [--quick] [--only steps many] [--name NAME] [--device cuda]

Each module of ``MODULES`` runs in a process of its own and gives its rows; their table is printed,
and written with the machine and the versions to benchmarks/results/NAME.json, with a plot to
docs/performance/NAME.svg. ``python docs/performance.py`` then writes the page. Whatever could not
run is named at the end, and the exit status is 1; a number over its bound is no failure.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
Row = dict[str, Any]
FIELDS: dict[str, Any] = {  # of a row: what it may be
    "name": str,
    "peft": (int, float, type(None)),
    "ours": (int, float, type(None)),  # None: not measured, and "note" says why
    "unit": str,
    "bound": (int, float, type(None)),
}
OPTIONAL: dict[str, Any] = {"note": str, "at_least": bool, "module": str}


def checked(rows: Iterable[Row], module: str) -> list[Row]:
    """The rows, with the module's name in each.

    Raises:
        ValueError: a row is not what ``FIELDS`` says, or a value is no finite number.
    """
    found = []
    for row in rows:
        for name, kind in FIELDS.items():
            if name not in row:
                raise ValueError(f"{module}.rows(): {row} has no {name!r}")
            if not isinstance(row[name], kind) or isinstance(row[name], bool):
                raise ValueError(f"{module}.rows(): {name}={row[name]!r} in {row['name']!r}")
        if unknown := set(row) - set(FIELDS) - set(OPTIONAL):
            raise ValueError(f"{module}.rows(): {row['name']!r} has unknown {sorted(unknown)}")
        numbers = [row[n] for n in ("peft", "ours", "bound") if row[n] is not None]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{module}.rows(): {row['name']!r} has a value that is not finite")
        if row["ours"] is None and not row.get("note"):
            raise ValueError(f"{module}.rows(): {row['name']!r} was not measured; say why in note")
        found.append(dict(row) | {"module": module})
    if not found:
        raise ValueError(f"{module}.rows() gave no row")
    return found


def verdict(row: Row) -> str:
    """Whether a row keeps to its bound."""
    if row["ours"] is None:
        return "not measured"
    if row["bound"] is None:
        return "-"
    within = row["ours"] >= row["bound"] if row.get("at_least") else row["ours"] <= row["bound"]
    return "yes" if within else "NO"


def number(value: float | None, unit: str) -> str:
    """A value with three significant digits, and its unit where that is not "ratio"."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{min(digits, 4)}f}"
    else:
        text = f"{value:.1e}"
    return f"{text} {unit}" if unit in ("s", "ms", "MB") else text


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    bound = number(row["bound"], row["unit"])
    if row.get("at_least") and row["bound"] is not None:
        bound = f"at least {bound}"
    values = [number(row["peft"], row["unit"]), number(row["ours"], row["unit"])]
    return [row["name"], *values, bound, verdict(row)]


HEADER = ["row", "PEFT", "ours", "at most", "met"]


def table(rows: Iterable[Row]) -> str:
    """The table in Markdown, its columns aligned."""
    lines = [HEADER, *map(cells, rows)]
    wide = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]

    def text(line: list[str]) -> str:
        rest = (c.rjust(w) for c, w in zip(line[1:], wide[1:], strict=True))
        return f"| {line[0].ljust(wide[0])} | {' | '.join(rest)} |"

    rule = f"|{'-' * (wide[0] + 2)}|{''.join('-' * (w + 1) + ':|' for w in wide[1:])}"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def processor() -> str:
    """The CPU's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.M)
    return names[0].strip() if names else platform.machine()


def versions() -> dict[str, str]:
    """Of what was measured, and of what it stands on."""
    found = {"python": platform.python_version()}
    for name in ("graftwork", "peft", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of this tree; "+" where files of it have been changed since."""
    run: Callable[..., str] = lambda *a: subprocess.run(  # noqa: E731
        ["git", "-C", str(ROOT), *a], capture_output=True, text=True
    ).stdout.strip()
    changed = run("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    return (run("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where this runs."""
    import torch

    import step

    found = {
        "cpu": processor(),
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "bf16 units": ", ".join(step.bf16_units()) or "none",
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found if device == "cpu" else {"gpu": torch.cuda.get_device_name()} | found


def child(module: str, out: Path, quick: bool, device: str, threads: int) -> None:
    """Run one module in this process and write its rows."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    rows = importlib.import_module(module).rows
    known = inspect.signature(rows).parameters
    given = {k: v for k, v in {"quick": quick, "device": device}.items() if k in known}
    if device != "cpu" and "device" not in known:
        raise SystemExit(f"{module}.rows() takes no device: it measures CPUs only")
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
            done = subprocess.run(command, env=environment)
            if done.returncode or not out.exists():
                wrong.append(f"{module}: ended with status {done.returncode}, see above")
                continue
            found = json.loads(out.read_text(encoding="utf-8"))
        print(f"{table(found)}\n({time.perf_counter() - began:.0f} s)\n", flush=True)
        rows += found
    return rows, wrong


def digest(rows: list[Row]) -> str:
    """A mark of the rows, by which a plot names the data that it shows."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def times_the_bound(row: Row, who: str) -> float | None:
    """How many times its bound a value is; below 1 is within, also where more is better."""
    value = row[who]
    if value is None or not row["bound"] or value <= 0:
        return None
    return float(row["bound"] / value if row.get("at_least") else value / row["bound"])


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of every row that has a bound, in multiples of the bound, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "graftwork", "font.size": 9}
    import matplotlib.pyplot as plt

    rows = [r for r in result["rows"] if times_the_bound(r, "ours") is not None][::-1]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.36 * len(rows)), layout="constrained")
    for who, colour, offset in (("peft", "#b0b0b0", 0.19), ("ours", "#2b6ca3", -0.19)):
        name = {"peft": "PEFT", "ours": "graftwork"}[who]
        at = [(i, times_the_bound(r, who)) for i, r in enumerate(rows)]
        shown = [(i, v) for i, v in at if v is not None]
        where, values = [i + offset for i, _ in shown], [v for _, v in shown]
        widths = [v - LEFT for v in values]
        axes.barh(where, widths, 0.36, left=LEFT, color=colour, label=name)
        for (i, value), y in zip(shown, where, strict=True):
            text = number(rows[i][who], rows[i]["unit"])
            axes.text(max(value, LEFT) * 1.03, y, text, va="center", fontsize=7.5)
    largest = max(times_the_bound(r, w) or 1 for r in rows for w in ("peft", "ours")) if rows else 1
    axes.set_xscale("log")
    axes.set_xlim(LEFT, max(2.0, largest) * 1.6)
    axes.axvline(1, color="#c0392b", linewidth=1.2, label="bound")
    axes.set_yticks(range(len(rows)), [f"{r['name']}  (bound {cells(r)[3]})" for r in rows])
    axes.set_xlabel("multiples of the bound; left of the line is within it")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": digest(result["rows"])})
    plt.close(figure)


LEFT = 0.02  # where bars begin: what is fifty times better than its bound shows as a stub


def write(result: dict[str, Any], name: str) -> Path:
    """Write the JSON."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def merged(rows: list[Row], path: Path) -> list[Row]:
    """New rows, and those of an earlier run of other modules, in the order of ``MODULES``."""
    fresh = {r["module"] for r in rows}
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = [r for r in old if r["module"] not in fresh]
    return sorted([*rows, *kept], key=lambda r: list(MODULES).index(r["module"]))


def arguments() -> argparse.Namespace:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=list(MODULES), metavar="NAME")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--name", help="of the result's file; the CPU's or GPU's name otherwise")
    parser.add_argument("--no-plot", action="store_true", help="matplotlib is not needed then")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.quick, args.device, args.threads)
        return
    rows, wrong = collect(args.only or MODULES, args.quick, args.device, args.threads)
    here = machine(args.device, args.threads)
    name = args.name or re.sub(r"\W+", "-", f"{here.get('gpu', here['cpu'])}".lower()).strip("-")
    name = f"{name}-quick" if args.quick else name
    if rows:
        path = RESULTS / f"{name}.json"
        result = {
            "machine": here,
            "versions": versions(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "commit": commit(),
            "quick": args.quick,
            "rows": merged(rows, path) if args.only else rows,
        }
        print(f"{table(result['rows'])}\n\n{write(result, name)}")
        if not args.no_plot:
            plot(result, PLOTS / f"{name}.svg")
            print(PLOTS / f"{name}.svg")
    if any(r["ours"] is None for r in rows):
        print("not measured:", *sorted({r["note"] for r in rows if r["ours"] is None}), sep="\n  ")
    if wrong:
        raise SystemExit("INCOMPLETE:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()
