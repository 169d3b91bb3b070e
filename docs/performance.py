"""Write the results into performance.md: ``python docs/performance.py``.

One section for each machine, from ``benchmarks/results/*.json``, between ``<!-- results -->`` and
``<!-- end -->``; the rest of the page is written by hand. ``make bench`` writes those files and the
plots in docs/performance/, and then runs this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, PLOTS = HERE / "performance.md", HERE / "performance"
RESULTS = HERE.parent / "benchmarks" / "results"
sys.path.insert(0, str(HERE.parent / "benchmarks"))

import report  # noqa: E402  (both are in benchmarks/)
import run  # noqa: E402


def when(measured: dict[str, Any]) -> list[str]:
    """Date, commit and versions, each once, with the modules that it holds for."""
    groups: dict[str, list[str]] = {}
    for module, of in measured.items():
        names = ", ".join(f"{name} {number}" for name, number in of["versions"].items())
        text = f"measured {of['date']} at commit {of['commit']} with {names}"
        groups.setdefault(text, []).append(module)
    if len(groups) == 1:
        return [f"- {text}" for text in groups]
    return [f"- {', '.join(modules)}: {text}" for text, modules in groups.items()]


def section(path: Path) -> str:
    """One machine: what it is, its table, its plot.

    Raises:
        SystemExit: its plot is missing, or shows other numbers.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    plot = PLOTS / f"{path.stem}.svg"
    mark = report.digest(result["rows"])
    if not plot.exists() or mark not in plot.read_text(encoding="utf-8"):
        remedy = f"python benchmarks/run.py --plot-only {path.name}"
        raise SystemExit(f"docs/performance/{plot.name} does not show {path.name}; run: {remedy}")
    here = result["machine"]
    title = here.get("gpu", here["cpu"])
    facts = [f"- {key}: {value}" for key, value in here.items()]
    missing = [name for name in run.MODULES if name not in result["measured"]]
    lines = [f"### {title} (`{path.stem}`)", "", *facts, *when(result["measured"])]
    if missing:
        lines.append(f"- not run there: {', '.join(missing)}")
    notes = sorted({row["note"] for row in result["rows"] if row.get("note")})
    lines += ["", report.table(result["rows"]), ""]
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    lines += [f"![{title}: every row beside its bound](performance/{plot.name})", ""]
    return "\n".join(lines)


def results() -> str:
    """The sections of all machines."""
    found = [section(path) for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join(found) if found else "None yet: run `make bench`.\n"


def page(text: str) -> str:
    """The page with the results in their place."""
    before, mark, rest = text.partition("<!-- results -->\n")
    if not mark or "<!-- end -->" not in rest:
        raise SystemExit("docs/performance.md: <!-- results --> or <!-- end --> is missing")
    return f"{before}{mark}{results()}<!-- end -->{rest.partition('<!-- end -->')[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
