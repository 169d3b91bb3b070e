"""Tensors out of a pickle, by PyTorch's restricted unpickler: no code, and no more memory than the
file has bytes.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError


def unpickled(path: Path, device: Any = "cpu") -> dict[str, Tensor]:
    """The tensors of a pickle, by name.

    Args:
        path: the file.
        device: where to.

    Raises:
        FileError: it is damaged, or holds more than tensors.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        _bounded(path)
        loaded = torch.load(path, device, weights_only=True)
        return {_a_name(name): _a_tensor(value) for name, value in loaded.items()}
    except Exception as error:  # bytes that nobody checked go through an interpreter
        reason = f"{type(error).__name__}: {str(error)[:300]}".partition("\n")[0]
        raise FileError(
            f"{path} is damaged, or holds more than tensors, such as code to run; it was not "
            f"read: {reason}"
        ) from error


def _bounded(path: Path) -> None:
    """Refuse an archive that holds more than its file: PyTorch stores, and never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        every = archive.infolist()
    if sum(one.file_size for one in every) > os.path.getsize(path):
        raise ValueError("it would unpack to more than the file has bytes")


def _a_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a {type(name).__name__} is among the names")
    return name


def _a_tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"a {type(value).__name__} is among the tensors that is no plain tensor")
    return value
