"""What each method can do, as measured by ``tests/test_matrix.py``, beside what PEFT's can."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

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
SIGNS = {"yes": "+", "part": "~", "no": ".", "-": " ", "impossible": "x"}


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


def text() -> str:
    """The matrix for a terminal: in each cell this library's sign, then PEFT's."""
    data, columns = load(), list(MEANING)
    width = max(map(len, data["ours"]))
    head = " ".join(f"{i:>2}" for i in range(1, len(columns) + 1))
    lines = [f"{'':<{width}}  {head}"]
    for row, cells in data["ours"].items():
        theirs = data["peft"].get(row, {})
        pairs = (SIGNS[cells[c].partition(":")[0]] + SIGNS[theirs.get(c, "-")] for c in columns)
        lines.append(f"{row:<{width}}  {' '.join(pairs)}")
    signs = "+ yes, ~ in part, . no, x impossible"
    lines += ["", f"each cell: graftwork, then PEFT {PEFT_RELEASE}; {signs}"]
    lines += [f"{i:>2} {c:<12} {MEANING[c]}" for i, c in enumerate(columns, 1)]
    lines += ["", "impossible, each refused by an error with this reason:"]
    lines += [f"  {why} ({', '.join(cells)})" for why, cells in impossible().items()]
    return "\n".join(lines)
