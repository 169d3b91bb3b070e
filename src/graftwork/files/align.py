"""Names of a file that differ from the model's at their front alone: a wrapper more or less, or
``model.`` where it is ``language_model.`` here, as transformers has moved them more than once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def moved(file: Shapes, model: Shapes, keys: Mapping[str, str]) -> tuple[str, str] | None:
    """The front of all names in a file, and what it has to be here; None where there is not exactly
    one such pair with which all names and shapes fit.

    Args:
        file: shapes by the names in the file that the model lacks.
        model: shapes by the names in the model that the file lacks.
        keys: what of the latter stands behind the path of a layer.
    """
    if not file or len(file) != len(model):
        return None
    name = min(file)
    fronts = {
        _fronts(name, other, keys[other].count(".") + 1)
        for other, shape in model.items()
        if shape == file[name]
    }
    fitting = [pair for pair in fronts if pair is not None and _fits(*pair, file, model)]
    return fitting[0] if len(fitting) == 1 else None


def _fronts(name: str, other: str, end: int) -> tuple[str, str] | None:
    """What stands in front of the longest common end of two names, in whole components; None where
    that is no more than their last ``end``, or a number was exchanged: that is another layer, and
    no other wrapper.
    """
    a, b, common = name.split("."), other.split("."), 0
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
        common += 1
    if common <= end or (a and b and any(part.isdigit() for part in a + b)):
        return None
    return tuple("".join(f"{part}." for part in one) for one in (a, b))  # type: ignore[return-value]


def _fits(old: str, new: str, file: Shapes, model: Shapes) -> bool:
    if not all(name.startswith(old) for name in file):
        return False
    names = {new + name.removeprefix(old): shape for name, shape in file.items()}
    return names == dict(model)


def mapping(old: str, new: str) -> dict[str, str]:
    """A ``key_mapping`` that exchanges the front of the names of layers."""
    front = re.escape(old) if old else r"(?!base_model\.)"
    return {f"^{front}": new.replace("\\", r"\\")}
