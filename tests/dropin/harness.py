"""Programs for PEFT, each run by itself: ``peft`` with the real one, ``alias`` with this library in
its place. What a program returns, raises and warns of is printed as JSON.
"""

from __future__ import annotations

import enum
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Program = Callable[[Any], Any]
PROGRAMS: dict[str, Program] = {}
PHRASES: dict[str, tuple[str, ...]] = {}


def program(*phrases: str) -> Callable[[Program], Program]:
    """Register a program; ``phrases``: what others match in its error or warnings."""

    def keep(function: Program) -> Program:
        assert function.__name__ not in PROGRAMS
        PROGRAMS[function.__name__] = function
        PHRASES[function.__name__] = phrases
        return function

    return keep


def folder() -> Path:
    """An empty folder."""
    return Path(tempfile.mkdtemp())


@torch.no_grad()
def fill(model: Any, names: Sequence[str] = ("lora_",)) -> None:
    """Give trained parameters numbers that depend on their place alone."""
    for i, (name, p) in enumerate(sorted(model.named_parameters())):
        if p.requires_grad and any(n in name for n in names):
            generator = torch.Generator().manual_seed(i)
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def plain(value: Any) -> Any:
    """As data: numbers rounded, tensors by shape and sum, classes by name."""
    if isinstance(value, Tensor):
        return [list(value.shape), plain(float(value.detach().double().sum()))]
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)) or hasattr(value, "__iter__"):
        return [plain(v) for v in value]
    if isinstance(value, type):
        return value.__name__
    return str(value)


def run(function: Program, peft: Any) -> dict[str, Any]:
    """What a program does."""
    out: dict[str, Any] = {"value": None, "error": None}
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out["value"] = plain(function(peft))
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            out["error"] = [names, str(error), traceback.format_exc()[-1500:]]
    out["warnings"] = [
        [[kind.__name__ for kind in w.category.__mro__], str(w.message)] for w in caught
    ]
    return out


def main(which: str, wanted: Sequence[str]) -> None:
    """Run the programs, all of them by default."""
    if which == "alias":
        import graftwork

        graftwork.as_peft()
    import peft
    import programs_layers  # noqa: F401 - they register themselves
    import programs_models  # noqa: F401
    import programs_texts  # noqa: F401
    import programs_training  # noqa: F401

    sys.modules.setdefault("harness", sys.modules["__main__"])
    results = {name: run(f, peft) for name, f in PROGRAMS.items() if not wanted or name in wanted}
    print(json.dumps({"results": results, "phrases": PHRASES}))


if __name__ == "__main__":
    sys.modules["harness"] = sys.modules["__main__"]
    sys.path.append(str(Path(__file__).parent.parent))
    main(sys.argv[1], sys.argv[2:])
