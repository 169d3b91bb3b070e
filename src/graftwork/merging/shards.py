"""The safetensors files of a model: tensors as views whose memory can be given back, and writing
such files tensor by tensor.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..files.atomic import replacing
from ..files.bounded import weight_map
from ..files.mapped import DTYPES, layout

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
CHUNK = 1 << 20  # bytes that are copied at once


class Shard:
    """One file.

    Args:
        path: where it is.

    Raises:
        FileError: it is damaged, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        held = layout(path)
        self.path, self.entries, self.metadata = path, held.entries, dict(held.metadata)
        with open(path, "rb") as data:
            self.map = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_COPY)

    def view(self, name: str) -> Tensor:
        """A tensor, without a copy where its place in the file allows that.

        Raises:
            FileError: it is of a dtype that is not computed with.
        """
        one = self.entries[name]
        if one.kind not in DTYPES:
            raise FileError(
                f"{name} in {self.path} is of the type {one.kind}, into which nothing can be "
                "merged; take the model before it was quantised"
            )
        dtype = DTYPES[one.kind]
        if one.begin == one.end:
            return torch.empty(one.shape, dtype=dtype)
        if one.begin % dtype.itemsize:
            return torch.frombuffer(
                bytearray(self.map[one.begin : one.end]), dtype=dtype
            ).view(one.shape)  # fmt: skip
        count = (one.end - one.begin) // dtype.itemsize
        whole = torch.frombuffer(self.map, dtype=dtype, count=count, offset=one.begin)
        return whole.view(one.shape)

    def forget(self) -> None:
        """Give back the memory of what was read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


def shards_of(folder: Path) -> list[Shard]:
    """The files of a model's folder in their order.

    Raises:
        FileError: there are none, or one is missing.
    """
    if (index := folder / INDEX).is_file():
        names: dict[str, Any] = dict.fromkeys(weight_map(index).values())
    elif (folder / SINGLE).is_file():
        names = {SINGLE: None}
    else:
        raise FileError(
            f"{folder} has neither {SINGLE} nor {INDEX}; weights in other formats are merged with "
            "--in-memory"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileError(f"{folder} lacks {missing[0]}, which its {INDEX} names; fetch it again")
    return [Shard(folder / name) for name in names]


@dataclass(frozen=True)
class Piece:
    """One tensor of a file that is to be written.

    Args:
        name: its name there.
        kind: safetensors' name of its dtype.
        shape: its shape.
        value: computes it; None: it is copied.
        source: where it is copied from.
        key: its name there.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    value: Callable[[], Tensor] | None = None
    source: Shard | None = None
    key: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        if self.source is not None:
            one = self.source.entries[self.key]
            return one.end - one.begin
        count = 1
        for n in self.shape:
            count *= n
        return count * DTYPES[self.kind].itemsize


def write(path: Path, pieces: Iterable[Piece], metadata: Mapping[str, str]) -> None:
    """Write a file tensor by tensor; it is there whole, or not at all."""
    pieces, header, place = list(pieces), {"__metadata__": dict(metadata)}, 0
    head: dict[str, Any] = dict(header)
    for one in pieces:
        offsets = [place, place + one.size]
        head[one.name] = {"dtype": one.kind, "shape": list(one.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in pieces:
            _put(file, one)


def _put(file: Any, one: Piece) -> None:
    if one.value is not None:
        tensor = one.value().detach().cpu().contiguous()
        assert tuple(tensor.shape) == one.shape and KINDS[tensor.dtype] == one.kind, one.name
        if tensor.numel():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return
    assert one.source is not None
    entry = one.source.entries[one.key]
    with open(one.source.path, "rb") as source:
        source.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            block = source.read(min(left, CHUNK))
            if not block:
                raise FileError(
                    f"{one.source.path} is shorter than its header says; fetch it again"
                )
            file.write(block)
            left -= len(block)
