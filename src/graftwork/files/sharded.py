"""An adapter whose weights lie in several files, as transformers' own ``save_pretrained`` writes a
large one: an index says which tensor is where.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..errors import FileError
from .atomic import WEIGHTS
from .bounded import weight_map
from .hub import Source
from .mapped import read

# transformers gives the index of an adapter the name of a model's
INDEXES = (f"{WEIGHTS}.index.json", "model.safetensors.index.json")
SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")


def shards_of(source: Source) -> dict[Path, set[str]]:
    """The files and the tensors that are said to be in each; nothing where there is no index.

    Raises:
        FileError: the index is damaged, names files elsewhere, or one of them is missing.
    """
    for name in INDEXES:
        if (index := source.find(name)) is not None and (named := _named(index)):
            if outside := sorted(n for n in named if not SHARD.fullmatch(n)):
                raise FileError(
                    f"{index} names {outside[:3]}, which are no files of an adapter's weights "
                    "(adapter_model-00001-of-00002.safetensors); it is damaged or hostile"
                )
            found = {source.find(one): tensors for one, tensors in named.items()}
            if None in found:
                lost = next(one for one in sorted(named) if source.find(one) is None)
                raise FileError(
                    f"{source} lacks {lost}, which its {name} names; fetch or copy it again"
                )
            return {path: tensors for path, tensors in found.items() if path is not None}
    return {}


def _named(index: Path) -> dict[str, set[str]]:
    """File -> its tensors; nothing where it is the index of a model, without an adapter's files."""
    named: dict[str, set[str]] = {}
    for tensor, name in weight_map(index).items():
        named.setdefault(name, set()).add(tensor)
    own = index.name == INDEXES[0] or any(SHARD.fullmatch(name) for name in named)
    return named if own else {}


def read_shards(source: Source) -> dict[str, Tensor] | None:
    """The tensors of all files; None where there is no index.

    Raises:
        FileError: a file is missing or damaged, or does not hold what the index says.
    """
    shards, tensors = shards_of(source), {}
    for path, named in shards.items():
        own = read(path)[0]
        if odd := sorted(named ^ own.keys()):
            raise FileError(
                f"{path} and the index of {source} do not both have {odd[0]}: these files are not "
                "of one save; fetch or copy them again"
            )
        tensors.update(own)
    return tensors if shards else None
