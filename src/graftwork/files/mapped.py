"""Reading a safetensors file: one mapping of it into memory, and a view of that for each tensor.

Nothing is copied before a tensor is filled from a view, and nothing is made before the header has
been checked against the length of the file. safetensors' own ``get_tensor`` makes a storage for
each tensor, which takes as long as all else in loading.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError
from .bounded import LARGEST, parsed, shown

MAX_HEADER = 20 * 2**20  # bytes; that of 100,000 tensors has 15 MB
MAX_AXES = 64  # of a tensor: PyTorch's own bound
MAX_PIECES = 1_200_000  # values in it; a tensor has about ten
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


class Entry(NamedTuple):
    """One tensor of a file: safetensors' name of its dtype, its shape, and from which byte of the
    file on, and up to which, it stands.
    """

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Layout(NamedTuple):
    """What stands where in a file: its tensors in their order there, and the header's notes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    start: int  # where the header ends
    size: int  # of the file


def layout(path: Path) -> Layout:
    """What stands where in a safetensors file.

    Raises:
        FileError: it is none, damaged, or its header is far too large.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise FileError(f"{path} is no file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            count = int.from_bytes(file.read(8), "little")
            header = file.read(count) if count <= min(MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if not header:
        why = "there is no such header in it" if count > size - 8 else "no header is so large"
        raise _damaged(path, f"a header of {count} bytes is announced, and {why}")
    return placed(header, size, path)


def placed(header: bytes, size: int, where: object = "the file") -> Layout:
    """What a header says, checked against the size of its file.

    Args:
        header: the text of it.
        size: bytes of the whole file.
        where: the file, for messages.

    Raises:
        FileError: it is damaged: tensors overlap, leave holes, are not as long as their shapes.
    """
    if not header.startswith(b"{"):
        raise _damaged(where, "its header is no JSON object")
    try:
        data = parsed(header, "its header", MAX_PIECES)
    except FileError as error:
        raise _damaged(where, str(error)) from error
    metadata = data.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(where, "the notes in its header are no texts")
    start = last = 8 + len(header)
    found = {}
    every = [(name, _entry(name, one, start, where)) for name, one in data.items()]
    for name, entry in sorted(every, key=lambda item: item[1][2:]):
        if entry.begin != last:
            raise _damaged(where, f"{shown(name)} does not begin where the one before it ends")
        found[name], last = entry, entry.end
    if last != size:
        raise _damaged(where, f"its tensors end at byte {last}, and it has {size} bytes")
    return Layout(found, metadata, start, size)


def _entry(name: str, one: Any, start: int, where: object) -> Entry:
    asked = ("dtype", "shape", "data_offsets") if isinstance(one, dict) else ()
    given: list[Any] = [one.get(key) for key in asked] or [None] * 3
    kind, shape, offsets = given
    known = isinstance(kind, str) and _sizes(shape) and len(shape) <= MAX_AXES
    if not (known and _sizes(offsets) and len(offsets) == 2):
        raise _damaged(where, f"what it says of {shown(name)} is no tensor")
    begin, end = offsets
    long = math.prod(shape) * DTYPES[kind].itemsize if kind in DTYPES else end - begin
    if not begin <= end <= LARGEST // 2 or end - begin != long:
        raise _damaged(
            where, f"{shown(name)} of the shape {shown(shape)} takes {shown(long)} bytes, and it "
            f"stands in {shown(end - begin)}"
        )  # fmt: skip
    return Entry(kind, tuple(shape), start + begin, start + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _damaged(where: object, why: str) -> FileError:
    return FileError(f"{where} is damaged or no safetensors file: {why}")


@contextmanager
def opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file, as safetensors reads it.

    Raises:
        FileError: it is none, or damaged.
    """
    layout(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the metadata in its header.

    Raises:
        FileError: it is no safetensors file, or damaged.
    """
    held = layout(path)
    found = _views(path, held) if sys.byteorder == "little" else None
    if found is None:
        with opened(path) as file:
            found = {name: file.get_tensor(name) for name in held.entries}
    return found, held.metadata


def _views(path: Path, held: Layout) -> dict[str, Tensor] | None:
    """Views of a file; None where a type or a place is unusual."""
    if not held.entries:
        return {}
    size, start = held.size, held.start
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    data = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    whole: dict[str, Tensor] = {}  # all that follows the header, as numbers of each type
    found = {}
    for name, (kind, shape, begin, end) in held.entries.items():
        if kind not in DTYPES:
            return None
        width = DTYPES[kind].itemsize
        if start % width or (begin - start) % width:
            return None
        if kind not in whole:
            whole[kind] = data[start : size - (size - start) % width].view(DTYPES[kind])
        first, last = (begin - start) // width, (end - start) // width
        found[name] = whole[kind][first:last].view(shape)
    return found
