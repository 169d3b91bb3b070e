"""What an adapter's folder holds, by its config and the header of its weights alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..config import PeftConfig
from ..errors import FileError
from ..meaning import default_of
from .codec import PREFIX, ROOT
from .folder import PICKLE, WEIGHTS
from .hub import Source
from .mapped import layout
from .sharded import shards_of

FILLED_IN = {f.name for f in fields(PeftConfig)}  # what the library writes into a config
TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


@dataclass(frozen=True)
class Held:
    """One tensor of a file: its name, type and shape."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass
class Group:
    """Places of a model that differ in the numbers of their path alone.

    Args:
        pattern: their path, with ``*`` for those numbers.
        places: the paths.
        tensors: what is held at each, and its shapes.
        whole: whether these are modules that are trained as a whole.
    """

    pattern: str
    places: set[str]
    tensors: dict[str, set[tuple[int, ...]]]
    whole: bool


def read_header(source: Source) -> tuple[list[Held], int]:
    """The tensors of an adapter without their values, and the size of the file in bytes.

    Raises:
        FileError: there is no file of that kind, or it is damaged.
    """
    path = source.find(WEIGHTS)
    paths = list(shards_of(source)) if path is None else [path]
    if not paths and source.find(PICKLE) is not None:
        raise FileError(
            f"{source} has its weights in {PICKLE}, a pickle, which can carry code and is not "
            "opened. If you trust it, load it with PeftModel.from_pretrained(..., "
            "allow_pickle=True), and save it again to have it as safetensors"
        )
    if not paths:
        raise FileError(f"{source} has no {WEIGHTS}, so the adapter is not whole; save it again")
    found = [layout(path) for path in paths]
    held = [
        Held(name, TYPES.get(one.kind, one.kind.lower()), one.shape)
        for each in found
        for name, one in sorted(each.entries.items())
    ]
    return held, sum(each.size for each in found)


def changed(config: PeftConfig) -> dict[str, Any]:
    """The fields of a config that are not at their defaults, as plain values."""
    plain, usual = json.loads(config.to_json()), {f.name: default_of(f) for f in fields(config)}
    return {
        name: value
        for name, value in plain.items()
        if name not in FILLED_IN and value is not None and getattr(config, name) != usual[name]
    }


def grouped(config: PeftConfig, held: Iterable[Held]) -> list[Group]:
    """What is held for which places."""
    groups: dict[tuple[str, bool], Group] = {}
    stems = {key.partition("_")[0] for key in getattr(config.ADAPTER, "keys", {}).values()}
    stems.add(config.method.lower().partition("_")[0])
    for one in held:
        front = PREFIX if one.name.startswith(PREFIX) else ROOT
        path, key = _split(one.name.removeprefix(front), stems)
        saved = getattr(config, "modules_to_save", None) or ()
        whole = any(f".{name}." in f".{path}." for name in saved)
        pattern = ".".join("*" if word.isdigit() else word for word in path.split("."))
        group = groups.setdefault((pattern, whole), Group(pattern, set(), {}, whole))
        group.places.add(path)
        group.tensors.setdefault(key, set()).add(one.shape)
    return list(groups.values())


def _split(name: str, stems: Iterable[str]) -> tuple[str, str]:
    """A place, and the name of a tensor there: it begins with a word such as ``lora_A``."""
    words = name.split(".")
    own = [i for i, w in enumerate(words) if "_" in w and w.partition("_")[0] in stems]
    at = own[-1] if own else len(words) - 1
    return ".".join(words[:at]).removesuffix(".base_layer"), ".".join(words[at:])


def shown(tensors: Mapping[str, set[tuple[int, ...]]]) -> list[str]:
    """The tensors of a group with their shapes."""
    return [
        f"{key} {' or '.join(' x '.join(map(str, shape)) or '1' for shape in sorted(shapes))}"
        for key, shapes in tensors.items()
    ]
