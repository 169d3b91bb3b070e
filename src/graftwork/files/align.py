"""Names of a file that differ from the model's: a wrapper more or less, ``model.`` where it is
``language_model.`` here, or another word within, as transformers has moved them more than once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

Shapes = Mapping[str, tuple[int, ...]]
Edit = tuple[str, str]  # a regex and its replacement, as of ``key_mapping``
DEPTH = 3  # so many edits one after another


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
    a, b = name.split("."), other.split(".")
    common = _strip(a, b, -1)
    if len(common) <= end or (a and b and any(part.isdigit() for part in a + b)):
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


def ways(names: Iterable[str], paths: Iterable[str]) -> Iterator[dict[str, str]]:
    """Every way in which a few edits bring the names of a file to the layers of a model.

    Args:
        names: tensors in the file.
        paths: the layers of the model.

    Yields:
        The edits, a ``key_mapping``; each one changes only what names no layer yet.
    """
    every: list[str] = list(names)
    leaves: dict[str, list[str]] = {}
    for path in paths:
        leaves.setdefault(path.rpartition(".")[2], []).append(path)
    known = {path for same in leaves.values() for path in same}
    seen: set[frozenset[tuple[str, str]]] = set()
    waiting: list[dict[str, str]] = [{}]
    while waiting:
        edits = waiting.pop(0)
        lost = next((n for n in every if owner(edited(n, edits, known), known) is None), None)
        if lost is None:
            result = frozenset((n, edited(n, edits, known)) for n in every)
            if result not in seen:
                seen.add(result)
                yield edits
        elif len(edits) < DEPTH:
            more = dict.fromkeys(_edits(edited(lost, edits, known), leaves))
            waiting += [{**edits, old: new} for old, new in more if old not in edits]


def owner(name: str, paths: set[str]) -> str | None:
    """The deepest layer in whose path a tensor's name begins."""
    at = len(name)
    while (at := name.rfind(".", 0, at)) > 0:
        if name[:at] in paths:
            return name[:at]
    return None


def edited(name: str, edits: Mapping[str, str], paths: set[str]) -> str:
    """A file's name with those edits that it needs to name a layer."""
    for old, new in edits.items():
        if owner(name, paths) is None:
            name = re.sub(old, new, name, count=1)
    return name


def _edits(name: str, leaves: Mapping[str, list[str]]) -> Iterator[Edit]:
    """What may have to be exchanged in a name, so that it is that of a tensor at some layer."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        for path in leaves.get(words[end - 1], ()):
            a, b = words[:end], path.split(".")
            tail, front = _strip(a, b, -1), _strip(a, b, 0)
            if a and b and any(word.isdigit() for word in a + b):
                continue  # that is another layer, and no other name
            if tail and (a or b):
                yield _edit(front, a, b)


def _edit(front: list[str], a: list[str], b: list[str]) -> Edit:
    kept = "".join(r"\d+\." if word.isdigit() else re.escape(f"{word}.") for word in front)
    old, new = (".".join([*words, ""]) for words in (a, b))
    return f"^({kept}){re.escape(old)}", rf"\g<1>{new}".replace("\\", r"\\").replace(r"\\g", r"\g")


def _strip(a: list[str], b: list[str], at: int) -> list[str]:
    """Take from both what they have in common at one end."""
    common = []
    while a and b and a[at] == b[at]:
        common.append(a.pop(at))
        b.pop(at)
    return common


def beside(file: Iterable[str], model: Iterable[str], limit: int = 12) -> str:
    """Names of a file and of a model side by side, numbers as ``*``; empty where a side is."""
    left, right = (_compact(names, limit) for names in (file, model))
    if not left or not right:
        return ""
    left, right = ["in the file", *left], ["in the model", *right]
    more = max(len(left), len(right))
    width = max(map(len, left))
    rows = zip(*(side + [""] * (more - len(side)) for side in (left, right)), strict=True)
    return "\n".join(f"  {one:<{width}} | {other}".rstrip() for one, other in rows)


def _compact(names: Iterable[str], limit: int) -> list[str]:
    found: Counter[str] = Counter()
    for name in names:
        found[".".join("*" if word.isdigit() else word for word in name.split("."))] += 1
    lines = [f"{name}  x{count}" if count > 1 else name for name, count in sorted(found.items())]
    return lines[:limit] + ([f"... and {len(lines) - limit} more"] if len(lines) > limit else [])
