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
QUICK = ROOT / "out" / "bench"  # what --quick writes, which is no result
Row = dict[str, Any]
Result = dict[str, Any]  # machine, measured (when and with what, by module), rows
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
        if row["bound"] == math.inf:  # what bounds nothing is no bound
            row = row | {"bound": None}
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
    """A value to about three digits, with its unit where that is one of measure."""
    if value is None:
        return "-"
    size = abs(value)
    if value == int(value) and unit not in ("ratio", "x"):
        text = str(int(value))
    elif 0.1 <= size < 1000:
        text = f"{value:.2f}" if size < 100 else f"{value:.0f}"
    else:
        text = f"{value:.3g}" if size > 1e-3 else f"{value:.1e}"
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
    warnings.simplefilter("ignore")
    rows = importlib.import_module(module).rows
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
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


def times_the_bound(row: Row, who: str) -> float:
    """How many times its bound a value is; below 1 is within, also where more is better."""
    value, bound = row[who], row["bound"]
    return float(bound / value if row.get("at_least") else value / bound)


COLOURS = {"peft": "#b8b8b8", "ours": "#2b6ca3"}
LABELS = {"peft": "PEFT", "ours": "graftwork"}
LEFT = 0.01  # where logarithmic bars begin: what is still smaller shows as a stub


def bars(axes: Any, rows: list[Row], value: Callable[[Row, str], float], left: float) -> None:
    """Two bars a row, each with its figure at its foot, or behind it where it is too short."""
    largest = max(value(r, w) for r in rows for w in COLOURS if r[w] is not None)
    largest = max(largest, 1.0) * 1.15
    for i, row in enumerate(rows):
        for who, offset in (("peft", 0.2), ("ours", -0.2)):
            if row[who] is None:
                continue
            end = max(value(row, who), left)
            axes.barh(i + offset, end - left, 0.38, left=left, color=COLOURS[who])
            share = end / largest if left == 0 else math.log(end / left) / math.log(largest / left)
            axes.annotate(
                number(row[who], row["unit"]), (left if share > 0.12 else end, i + offset),
                xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
                color="white" if who == "ours" and share > 0.12 else "black",
            )  # fmt: skip
        at = row["bound"] if left == 0 else 1.0
        axes.plot([at, at], [i - 0.42, i + 0.42], color="#c0392b", linewidth=2)
    if left:
        axes.set_xscale("log")
    axes.set_xlim(left, largest)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_yticks(range(len(rows)), [f"{r['name']}  ({cells(r)[3]})" for r in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def plot(result: Result, path: Path) -> None:
    """Bars of every row that has a bound: small ratios as they are, others in bounds.

    Args:
        result: what ``main`` writes.
        path: where to, an SVG; it names the rows that it shows by their ``digest``.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "graftwork", "font.size": 9}
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = [r for r in result["rows"] if r["ours"] and r["bound"]][::-1]
    ratios = [r for r in rows if r["unit"] in ("ratio", "x") and r["bound"] > 0.5]
    ratios = [r for r in ratios if not r.get("at_least")]
    others = [r for r in rows if r not in ratios]
    parts = [part for part in (ratios, others) if part]
    if not parts:
        raise SystemExit("no row with a bound was measured: nothing to plot (--no-plot)")
    figure, panels = plt.subplots(
        len(parts), figsize=(10, 1.6 + 0.42 * len(rows)), squeeze=False, layout="constrained",
        height_ratios=[len(part) + 0.8 for part in parts],
    )  # fmt: skip
    for axes, part in zip(panels[:, 0], parts, strict=True):
        if part is ratios:
            bars(axes, part, lambda r, who: float(r[who]), 0.0)
            axes.set_xlabel("ratio, as the row says; less is better")
        else:
            bars(axes, part, times_the_bound, LEFT)
            axes.set_xlabel("in multiples of the bound, logarithmic; less is better")
    legend = [Patch(color=COLOURS[who], label=LABELS[who]) for who in COLOURS]
    legend.append(Patch(color="#c0392b", label="bound"))
    figure.legend(handles=legend, loc="outside upper right", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": digest(result["rows"])}
                   if path.suffix == ".svg" else None)  # fmt: skip
    plt.close(figure)


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
    rows, wrong = collect(args.only or MODULES, args.quick, args.device, args.threads)
    if rows:
        here = machine(args.device, args.threads)
        name = args.name or re.sub(r"\W+", "-", here.get("gpu", here["cpu"]).lower()).strip("-")
        of = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "commit": commit()}
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
