"""Rows of measurements as a table and as a plot; benchmarks/run.py collects them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
SPEED_UPS = ("together",)  # whose rows are the better the larger


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
        more = {"at_least": True} if module in SPEED_UPS and row["bound"] is not None else {}
        found.append(more | row | {"module": module})
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


def is_ratio(unit: str) -> bool:
    """Whether a unit is none: "ratio", "x", "x base forward"."""
    return unit == "ratio" or unit.partition(" ")[0] == "x"


def number(value: float | None, unit: str) -> str:
    """A value to about three digits, with its unit where that is one of measure."""
    if value is None:
        return "-"
    size = abs(value)
    if value == int(value) and not is_ratio(unit):
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
    largest = max(value(r, w) for r in rows for w in COLOURS if r[w])
    largest = max(largest, 1.0) * 1.15
    for i, row in enumerate(rows):
        for who, offset in (("peft", 0.2), ("ours", -0.2)):
            if not row[who]:
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
    ratios = [r for r in rows if is_ratio(r["unit"]) and r["bound"] > 0.5]
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
