"""Adapters in folders of an adapter's own folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..config import CONFIG_NAME
from ..targets.names import check_name
from .bounded import plain_name
from .codec import ROOT
from .folder import read_tensors
from .hub import Source


def in_order(adapters: Mapping[str, str]) -> dict[str, str]:
    """In the order of the names, numbers by value: a file does not keep any other."""
    names = sorted(adapters, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
    for name in names:
        check_name(name, ())
    return {name: adapters[name] for name in names}


def within(source: Source, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Which adapters were saved within another: name -> where, and the folder there."""
    found = {}
    for name in filter(plain_name, names):
        if source.find(f"{name}/{CONFIG_NAME}") is not None:
            found[name] = source.where, f"{source.subfolder}/{name}".lstrip("/")
    return found


def strayed(places: Mapping[str, tuple[str, str]], front: str) -> dict[str, Tensor]:
    """PEFT 0.21.2 takes an adapter's name out of other names: where adapters are called 0, 1, ...,
    layer i of what begins with ``front`` is in folder i, without the i, and the adapters themselves
    are not whole.
    """
    found = {}
    for name, place in places.items():
        tensors = read_tensors(Source(*place))
        for leaf in ("weight", "bias"):
            if (key := f"{ROOT}{front}{leaf}") in tensors:
                found[f"{ROOT}{front}{name}.{leaf}"] = tensors[key]
    return found
