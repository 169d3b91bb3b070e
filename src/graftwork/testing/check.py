"""``check_method``: every law on every kind of layer, or on a whole model, as a table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..config import TargetConfig
from ..methods.ia3 import IA3Config
from ..methods.lora_config import LoraConfig
from . import laws
from .bench import Bench
from .layers import KINDS, Kind

WHOLE = "a transformer of two blocks"


@dataclass
class Report:
    """What a method does at each kind of layer, or in a whole model.

    Args:
        method: its name.
        rows: kind of layer -> law -> "yes", or why not; "whole" is a whole model.
    """

    method: str
    rows: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        """``kind: law`` -> why it does not hold; a refusal with a reason is none."""
        return {
            f"{kind}: {law}": text
            for kind, row in self.rows.items()
            for law, text in row.items()
            if text.startswith("FAILS")
        }

    def __str__(self) -> str:
        lines = [f"{self.method}"]
        for kind, row in self.rows.items():
            held = sum(text == "yes" for text in row.values())
            others = {text for text in row.values() if text != "yes"}
            told = f"{held} laws hold" if held else "-"
            lines.append(f"  {KINDS[kind].about if kind in KINDS else WHOLE:<32} {told}")
            lines += [f"      {text}" for text in sorted(others)]
        return "\n".join(lines)


def check_method(
    config: TargetConfig, call: Mapping[str, Any] | None = None, show: bool = True
) -> Report:
    """Run every law for a method on every kind of layer; where it sits at none, as virtual tokens
    do, in a transformer of two blocks.

    Args:
        config: a config of the method, small enough for layers of 6 to 12 channels; its targets
            are filled in.
        call: arguments of every call of the model that the method needs, such as task ids for
            four rows.
        show: print the table.

    Returns:
        What held; ``failures`` is empty where nothing is wrong.
    """
    report = Report(config.method)
    given = dict(call or {})
    for kind in KINDS:
        report.rows[kind] = _row(config, kind, given)
    if all("attaches" in row for row in report.rows.values()):
        from .blocks import BLOCKS

        whole = _row(config, BLOCKS, given)
        report.rows = {"whole": whole} if "attaches" not in whole else report.rows
    if show:
        print(report)
    return report


def _row(config: TargetConfig, kind: str | Kind, call: dict[str, Any]) -> dict[str, str]:
    alone = Bench(kind, [config], call)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone.model()
    except (ValueError, TypeError) as error:
        return {"attaches": f"refused: {error}".splitlines()[0]}
    trials = {name: partial(law, alone) for name, law in laws.LAWS.items()}
    trials["works_in bfloat16"] = partial(laws.works_in, torch.bfloat16, alone)
    for other in (LoraConfig(r=2), IA3Config()):
        both = Bench(kind, [config, other], call)
        trials[f"stacks_with_another {other.method}"] = partial(laws.stacks_with_another, both)
        trials[f"mixes_in_a_batch {other.method}"] = partial(laws.mixes_in_a_batch, both)
    return {name: _tried(name, trial) for name, trial in trials.items()}


def _tried(name: str, trial: Callable[[], None]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial()
    except Exception as error:
        text = str(error).strip().splitlines()
        return f"FAILS {name}: {type(error).__name__}: {text[0] if text else ''}"
    return "yes"
