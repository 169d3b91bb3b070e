"""What each method can do, as measured by ``tests/test_matrix.py``, beside what PEFT's can."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from textwrap import wrap

from .table import METHODS

PATH = Path(__file__).with_name("capabilities.json")
PEFT_RELEASE = "0.21.2"
MEANING = {
    "merge": "written into the weight",
    "unmerge": "and taken out again, bit for bit",
    "multi": "two of the method active at once",
    "mixbatch": "another adapter for each row of a batch",
    "disable": "switched off",
    "hotswap": "other values without recompilation",
    "weighted": "combined with weights",
    "delete": "removed",
    "Linear": "nn.Linear",
    "Conv1d": "nn.Conv1d",
    "Conv2d": "nn.Conv2d: dilation, groups, padding modes",
    "Conv3d": "nn.Conv3d",
    "tfConv1D": "transformers' Conv1D",
    "Embedding": "nn.Embedding: padding, max_norm, scaled",
    "MHA": "nn.MultiheadAttention, also unequal",
    "tgt_params": "stacked parameters, as of experts",
    "tied": "at a tied embedding",
    "overrides": "other values of its fields for some layers",
    "mod_to_save": "modules_to_save",
    "tok_idx": "trainable_token_indices",
    "layers_tt": "layers_to_transform",
    "exclude": "exclude_modules",
    "toLoRA": "converted to LoRA",
    "Mixed": "with LoRA in one model",
    "native": "injected without a wrapper",
    "low_mem": "loaded with low_cpu_mem_usage",
}
STARTS = (
    "A start that has no meaning at a layer, as PiSSA's at an embedding, is the plain one there, "
    "with a warning; the cell is that of the adapter."
)
SIGNS = {"yes": "+", "part": "~", "no": ".", "-": " ", "impossible": "x"}
NAME = 20  # columns of the names in a terminal; a longer one gets a line to itself


@cache
def load() -> dict[str, dict[str, dict[str, str]]]:
    """``ours``, ``peft`` -> row -> capability -> "yes", "impossible: why", "-", "part" or "no"."""
    found: dict[str, dict[str, dict[str, str]]] = json.loads(PATH.read_text(encoding="utf-8"))
    return found


def impossible() -> dict[str, list[str]]:
    """Why mathematics forbids a cell -> the cells, ``row: capability``."""
    reasons: dict[str, list[str]] = {}
    for row, cells in load()["ours"].items():
        for capability, cell in cells.items():
            kind, _, reason = cell.partition(": ")
            if kind == "impossible":
                reasons.setdefault(f"{row}: {reason}", []).append(capability)
    return reasons


def rows() -> dict[str, list[str]]:
    """Family -> the rows of its methods; LoRA's starts and variants stand at the end."""
    ours = load()["ours"]
    found: dict[str, list[str]] = {}
    for name in METHODS:
        if name in ours:
            found.setdefault(METHODS[name].family, []).append(name)
    found["LoRA's starts and variants"] = [name for name in ours if name not in METHODS]
    return found


def signs(row: str, capability: str) -> str:
    """A cell: this library's sign, then PEFT's."""
    data = load()
    theirs = data["peft"].get(row, {}).get(capability, "-")
    return SIGNS[data["ours"][row][capability].partition(":")[0]] + SIGNS[theirs]


def summary() -> str:
    """How many cells hold, of the rows that are measured here; in PEFT, of those that it has."""
    data = load()
    ours, peft = (
        Counter(
            cell.partition(":")[0] for row in data["ours"] for cell in table.get(row, {}).values()
        )
        for table in (data["ours"], data["peft"])
    )
    return (
        f"{len(data['ours'])} rows of {len(MEANING)} cells: {ours['yes']} yes, "
        f"{ours['impossible']} impossible, {ours['-']} without a meaning, "
        f"{ours['no'] + ours['part']} no. In PEFT {PEFT_RELEASE}: {peft['yes']} yes, "
        f"{peft['part']} in part, {peft['no']} no."
    )


def told(row: str) -> list[str]:
    """What the matrix says of one row, in sentences."""
    ours, peft = load()["ours"].get(row), load()["peft"].get(row, {})
    if ours is None:
        return ["It has no row in the matrix; graftwork.testing.check_method measures it."]
    can = [c for c, cell in ours.items() if cell == "yes"]
    lines = [f"{len(can)} of {len(ours)}: {', '.join(can)}."]
    for reason in dict.fromkeys(v for v in ours.values() if v.startswith("impossible")):
        cells = ", ".join(c for c, v in ours.items() if v == reason)
        lines.append(f"Impossible, since {reason.partition(': ')[2]}: {cells}.")
    if without := [c for c, cell in ours.items() if cell == "-"]:
        lines.append(f"Without a meaning here: {', '.join(without)}.")
    for kind, words in {"part": "only in part", "no": "not"}.items():
        if lacking := [c for c in can if peft.get(c) == kind]:
            lines.append(f"In PEFT {PEFT_RELEASE} {words}: {', '.join(lacking)}.")
    if not peft:
        lines.append("PEFT does not have it.")
    return lines


def text() -> str:
    """The matrix for a terminal of 100 columns."""
    columns = list(MEANING)
    width = max(len(name) for name in load()["ours"] if len(name) <= NAME)
    head = " ".join(f"{i:>2}" for i in range(1, len(columns) + 1))
    head = f"{'':<{width}}  {head}"
    lines = [head]
    for family, names in rows().items():
        lines += ["", family]
        for row in names:
            front = f"{row:<{width}}" if len(row) <= width else f"{row}\n{'':<{width}}"
            lines.append(f"{front}  {' '.join(signs(row, c) for c in columns)}".rstrip())
    lines += ["", head, ""]
    lines += [f"{i:>2} {c:<12} {MEANING[c]}" for i, c in enumerate(columns, 1)]
    lines += ["", "each cell: graftwork, then PEFT; + yes, ~ in part, . no, x impossible"]
    lines += wrap(summary(), 100)
    lines += wrap(STARTS, 100)
    lines += ["", "impossible, each refused by an error with this reason:"]
    for why, cells in impossible().items():
        told_why = f"{why} ({', '.join(cells)})"
        lines += wrap(told_why, 98, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
