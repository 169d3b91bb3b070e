"""What the fields of a config mean: the words behind them in the source, or in the docstring."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

FIELD = re.compile(r"^    (\w+): [^#\n]+#(?P<words>.*)$", re.M)
LINT = re.compile(r"^ *noqa: \w+( - PEFT's name;?)?")


def meanings(kind: type[Any]) -> dict[str, str]:
    """Field -> what it means; a class's own words go before those of its bases."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if is_dataclass(cls):
            found |= _arguments(cls.__doc__ or "")
            found |= {m[1]: LINT.sub("", m["words"]).strip() for m in FIELD.finditer(_source(cls))}
    for f in fields(kind):
        words = found.get(f.name, "")
        others = map(str, f.metadata.get("choices", ())[1:])
        if new := [one for one in others if one not in words]:
            found[f.name] = "; ".join(filter(None, [words, f"or {', '.join(new)}"]))
    return {name: words for name, words in found.items() if words}


def default_of(field: Field[Any]) -> Any:
    """What a field holds where nothing is given; None where something must be."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def own(kind: type[Any]) -> list[Field[Any]]:
    """The fields that a class itself defines."""
    return [f for f in fields(kind) if f.name in inspect.get_annotations(kind)]


def formula(doc: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(doc or "").partition("\n\n")[0].split())


def _source(cls: type[Any]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # typed in by hand
        return ""


def _arguments(doc: str) -> dict[str, str]:
    """The section Args of a docstring."""
    section = inspect.cleandoc(doc).partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.M)
    return {name: " ".join(words.split()).rstrip(".") for name, words in entries}
