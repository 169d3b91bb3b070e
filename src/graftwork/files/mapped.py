"""Reading a safetensors file: one mapping of it into memory, and a view of that for each tensor.

Nothing is copied before a tensor is filled from a view. ``safe_open`` checks the header; its own
``get_tensor`` makes a storage for each tensor, which takes as long as all else in loading.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError

DTYPES = {  # what else there is, safetensors reads
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@contextmanager
def opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file.

    Raises:
        FileError: it is none, or damaged.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise FileError(f"{path} is damaged or no safetensors file: {error}") from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the metadata in its header.

    Raises:
        FileError: it is no safetensors file, or damaged.
    """
    with opened(path) as file:
        found = _views(path) if sys.byteorder == "little" else None
        if found is None:
            found = {name: file.get_tensor(name) for name in file.keys()}
        return found, file.metadata() or {}


def _views(path: Path) -> dict[str, Tensor] | None:
    """Views of a file whose header has been checked; None where a type or a place is unusual."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    data = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    whole: dict[str, Tensor] = {}  # all that follows the header, as numbers of each type
    found = {}
    for name, entry in header.items():
        kind, (first, last) = entry["dtype"], entry["data_offsets"]
        if kind not in DTYPES:
            return None
        width = DTYPES[kind].itemsize
        if start % width or first % width:
            return None
        if kind not in whole:
            whole[kind] = data[start : size - (size - start) % width].view(DTYPES[kind])
        found[name] = whole[kind][first // width : last // width].view(entry["shape"])
    return found
