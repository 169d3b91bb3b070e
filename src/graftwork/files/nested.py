"""Adapters in folders of an adapter's own folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..config import CONFIG_NAME
from ..targets.names import check_name
from .codec import ROOT
from .folder import config_of, read_tensors
from .hub import Source


def in_order(adapters: Mapping[str, str]) -> dict[str, str]:
    """In the order of the names, numbers by value: a file does not keep any other."""
    names = sorted(adapters, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
    for name in names:
        check_name(name, ())
    return {name: adapters[name] for name in names}


class Held:
    """An adapter in a folder.

    Args:
        where: the folder or hub id.
        subfolder: a folder inside it.
    """

    def __init__(self, where: str, subfolder: str = "") -> None:
        self.source = Source(where, subfolder)
        self.content: tuple[Any, dict[str, Tensor]] | None = None

    def read(self) -> tuple[Any, dict[str, Tensor]]:
        """Its config and its tensors."""
        return config_of(self.source), read_tensors(self.source)

    def take(self) -> tuple[Any, dict[str, Tensor]]:
        """What was read of it before, once; else what is there now."""
        content, self.content = self.content or self.read(), None
        return content


def within(source: Source, names: Iterable[str]) -> dict[str, Held]:
    """The adapters that were saved within another, by name, as they are now: what is read of the
    outer one has to be of the same save.
    """
    found = {}
    for name in (n for n in names if ".." not in re.split(r"[/\\]", n)):
        if source.find(f"{name}/{CONFIG_NAME}") is not None:
            held = Held(source.where, f"{source.subfolder}/{name}".lstrip("/"))
            found[name], held.content = held, held.read()
    return found


def strayed(places: Mapping[str, Held], front: str) -> dict[str, Tensor]:
    """PEFT 0.21.2 takes an adapter's name out of other names: where adapters are called 0, 1, ...,
    layer i of what begins with ``front`` is in folder i, without the i, and the adapters themselves
    are not whole.
    """
    found = {}
    for name, place in places.items():
        tensors = read_tensors(place.source)
        for leaf in ("weight", "bias"):
            if (key := f"{ROOT}{front}{leaf}") in tensors:
                found[f"{ROOT}{front}{name}.{leaf}"] = tensors[key]
    return found
