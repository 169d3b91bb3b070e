"""Tensors out of a pickle, by PyTorch's restricted unpickler: no code, and no more memory than the
file has bytes.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

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
    if not path.is_file():
        raise FileError(f"{path} is no file")
    with open(path, "rb") as file:
        return loaded(file, os.fstat(file.fileno()).st_size, path, device)


def loaded(file: BinaryIO, size: int, where: object, device: Any = "cpu") -> dict[str, Tensor]:
    """As of ``unpickled``, from an open file of so many bytes."""
    try:
        _check_bounded(file, size)
        found = torch.load(file, device, weights_only=True)
        return {_a_name(name): _a_tensor(value) for name, value in found.items()}
    except Exception as error:  # bytes that nobody checked go through an interpreter
        reason = f"{type(error).__name__}: {str(error)[:300]}".partition("\n")[0]
        raise FileError(
            f"{where} is damaged, or holds more than tensors, such as code to run; it was not "
            f"read: {reason}"
        ) from error


def _check_bounded(file: BinaryIO, size: int) -> None:
    """Refuse an archive that holds more than its file: PyTorch stores, and never compresses."""
    packed = zipfile.is_zipfile(file)
    every = zipfile.ZipFile(file).infolist() if packed else []
    if sum(one.file_size for one in every) > size:
        raise ValueError("it would unpack to more than the file has bytes")
    file.seek(0)


def _a_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a {type(name).__name__} is among the names")
    return name


def _a_tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"a {type(value).__name__} is among the tensors that is no plain tensor")
    return value
