"""Where the adapters of a model are written: each into a folder of its own."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import FileError, StateError


def places(folder: Path, adapters: Mapping[str, Iterable[str]]) -> dict[str, Path]:
    """The folder of each adapter: ``default`` is in the given one, others below it.

    Args:
        folder: the folder that is given.
        adapters: the adapters' names, and what each has in folders within its own.

    Raises:
        StateError: two of them would be in one folder.
        FileError: the file system takes two names for one.
    """
    found = {name: folder if name == "default" else folder / name for name in adapters}
    names: dict[Path, str] = {path: name for name, path in found.items()}
    for name, inner in adapters.items():
        for other in (names.get(found[name] / one) for one in inner):
            if other is not None:
                raise StateError(
                    f"the folder {str(found[other])!r} would hold both the adapter {other!r} and a "
                    f"part of {name!r}; rename_adapter() the former, or save them apart"
                )
    alike: dict[str, str] = {}
    for name in adapters:
        first = alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if first != name and _one(found[first], found[name]):
            raise FileError(
                f"{first!r} and {name!r} are one folder in {folder}, whose file system takes one "
                "name for the other: rename_adapter() one of them, or save them apart"
            )
    return found


def _one(first: Path, second: Path) -> bool:
    """Whether two folders are the same one."""
    first.mkdir(parents=True, exist_ok=True)
    return second.exists() and second.samefile(first)
