"""Whether a file holds what was written into it: a few numbers of each merged tensor, read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..files.mapped import layout
from .shards import Piece

SAMPLE = 16  # numbers of a tensor that are read again


def sampled(piece: Piece, samples: dict[str, Tensor]) -> Piece:
    """A piece of which a few numbers are noted when it is computed."""
    if (compute := piece.value) is None:
        return piece

    def value() -> Tensor:
        tensor = compute()
        samples[piece.name] = _few(tensor).clone()
        return tensor

    return replace(piece, value=value)


def _few(tensor: Tensor) -> Tensor:
    """A few numbers of a tensor, from all over it."""
    return tensor.detach().cpu().reshape(-1)[:: _step(tensor.numel())]


def _step(count: int) -> int:
    return max(1, count // SAMPLE)


def read_back(path: Path, samples: dict[str, Tensor]) -> None:
    """Compare a file with what was to be in it.

    Raises:
        FileError: it holds something else.
    """
    held = layout(path)
    with open(path, "rb") as file:  # not mapped: each number would bring the pages around it
        for name, sample in samples.items():
            one, size = held.entries[name], sample.element_size()
            step = size * _step((one.end - one.begin) // size)
            for i, wanted in enumerate(sample.view(torch.uint8).reshape(-1, size)):
                file.seek(one.begin + i * step)
                if file.read(size) != bytes(wanted.tolist()):
                    raise FileError(
                        f"{path} does not hold the merged values of {name} after it was written; "
                        "the disk or its file system has lost them: write to another one"
                    )
