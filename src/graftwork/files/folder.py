"""One adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes
them.

Saving is atomic as a whole. The new config is written beside the old one under a name that holds
its digest; the weights, whose header names that digest, then replace the old weights in one rename;
then the config takes its place. A reader that comes after a crash between the two renames finds the
digest in the weights and takes the waiting config.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..config import CONFIG_NAME, PeftConfig
from ..errors import POLICY, FileError
from .hub import Source
from .mapped import opened, read

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
NOTE = "graftwork"  # the entry in the weights' header that is ours
BESIDE = {"training": "training_state", "start": "graftwork_start"}  # in that entry -> file
MAX_CONFIG = 16 * 2**20  # bytes; a config is a few kilobytes


def write(
    folder: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    note: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write an adapter folder; a crash at any moment leaves the old adapter or the new one.

    Args:
        folder: where to; made where it is missing.
        config: the adapter's config.
        tensors: its tensors under PEFT's full names.
        note: what else a reader should know, kept in the weights' header.
        beside: what is kept in files of their own, which other readers do not know: "training" is
            what a resumed training needs, "start" what the adapter began from.

    Raises:
        FileError: the folder cannot be written; the old adapter is intact.
    """
    text = config.to_json().encode()
    digest = hashlib.sha256(text).hexdigest()[:16]
    states = {key: to_bytes(_apart(t), {"format": "pt"}) for key, t in beside.items() if t}
    kept = {
        key: f"{BESIDE[key]}-{hashlib.sha256(state).hexdigest()[:16]}.safetensors"
        for key, state in states.items()
    }
    noted = {**note, "config": digest, "training": "", **kept}
    header = {"format": "pt", NOTE: json.dumps(noted, sort_keys=True)}
    waiting = f".{CONFIG_NAME}.{digest}"
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for key, name in kept.items():
            _replace(folder / name, states[key])
        _replace(folder / waiting, text)
        _replace(folder / WEIGHTS, to_bytes(_apart(tensors), header))
        # from here on the folder holds the new adapter
        os.replace(folder / waiting, folder / CONFIG_NAME)
        _sync_folder(folder)
        patterns = [f".{CONFIG_NAME}.*", *(f"{stem}-*.safetensors" for stem in BESIDE.values())]
        for old in [path for pattern in patterns for path in folder.glob(pattern)]:
            if old.name not in kept.values():
                old.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which share memory."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or hasattr(tensor, "ds_shape") or hasattr(tensor, "full_tensor"):
            tensor = _gathered(name, tensor)
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out


def _gathered(name: str, tensor: Tensor) -> Tensor:
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.full_tensor()
        return whole
    what = "is on the meta device, so it has no values" if tensor.is_meta else "is partitioned"
    raise FileError(
        f"{name} {what}; gather it before saving (deepspeed.zero.GatheredParameters), or load its "
        "values first"
    )


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of one at the end of the block, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(
            f"the adapter could not be saved in {folder}: {error}. What was there before is "
            "intact; choose another folder or make room"
        ) from error


def read_config(where: Any, subfolder: str | None = None, **options: Any) -> PeftConfig:
    """The config of an adapter, in its method's class.

    Raises:
        FileError: there is none, or it cannot be used.
    """
    return config_of(Source(where, subfolder, **options))


def config_of(source: Source, note: Mapping[str, Any] | None = None) -> PeftConfig:
    """The config that belongs to the weights of a source; ``note``: theirs, if it is known."""
    from ..table import METHODS, method

    path = source.find(CONFIG_NAME)
    noted = note if note is not None or source.folder is None else note_of(source)
    if source.folder is not None and (digest := (noted or {}).get("config")):
        waiting = source.find(f".{CONFIG_NAME}.{digest}")
        path = waiting or path
    if path is None:
        raise FileError(f"{source} has no {CONFIG_NAME}, so it is no adapter folder")
    if path.stat().st_size > MAX_CONFIG:
        raise FileError(
            f"{path} has {path.stat().st_size} bytes, far more than a config; it is damaged or "
            "hostile"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict) or "peft_type" not in data:
        raise FileError(
            f"{path} has no 'peft_type', so it is no adapter's config; give the folder that "
            "save_pretrained wrote"
        )
    if data["peft_type"] not in METHODS:
        raise FileError(
            f"{path} is of the method {data['peft_type']!r}; this version has {sorted(METHODS)}"
        )
    try:
        return method(data["peft_type"]).config.from_fields(data, str(path))
    except (TypeError, ValueError) as error:
        raise FileError(f"{path} cannot be used: {error}") from error


def note_of(source: Source) -> dict[str, Any]:
    """What this library noted in the header of the weights; empty for files of others."""
    path = source.find(WEIGHTS)
    if path is None:
        return {}
    with opened(path) as file:
        return _note(file.metadata() or {})


def _note(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        note = json.loads(metadata.get(NOTE, "{}"))
    except json.JSONDecodeError:
        return {}
    return note if isinstance(note, dict) else {}


class Contents:
    """The weights of an adapter and the note in their header, for which the file is read once."""

    def __init__(self, source: Source, allow_pickle: bool = False) -> None:
        self.source, self.allow_pickle = source, allow_pickle

    @cached_property
    def file(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What the file of weights holds, where there is one in the format of safetensors."""
        path = self.source.find(WEIGHTS)
        return None if path is None else read(path)

    @property
    def note(self) -> dict[str, Any]:
        """As of ``note_of``."""
        return {} if self.file is None else _note(self.file[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As of ``read_tensors``."""
        if self.file is None:
            return _unpickled(self.source, None, self.allow_pickle)
        return self.file[0]


def read_tensors(
    source: Source, device: str | None = None, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The tensors of an adapter, under the names in the file.

    Args:
        source: where from.
        device: where to; by default the CPU.
        allow_pickle: read ``adapter_model.bin`` too, with PyTorch's restricted unpickler.

    Raises:
        FileError: there are no weights, or they are damaged.
    """
    path = source.find(WEIGHTS)
    if path is not None:
        return {name: tensor.to(device or "cpu") for name, tensor in read(path)[0].items()}
    return _unpickled(source, device, allow_pickle)


def _unpickled(source: Source, device: str | None, allow_pickle: bool) -> dict[str, Tensor]:
    pickled = source.find(PICKLE)
    if pickled is None:
        raise FileError(f"{source} has neither {WEIGHTS} nor {PICKLE}, so it is no adapter folder")
    if not (allow_pickle or POLICY.lenient):
        raise FileError(
            f"{source} has its weights in {PICKLE}, a pickle, which can carry code. If you trust "
            "it, pass allow_pickle=True, and save it again to have it as safetensors"
        )
    try:
        loaded = torch.load(pickled, device or "cpu", weights_only=True)
        return {str(name): _a_tensor(value) for name, value in loaded.items()}
    except (UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(
            f"{pickled} is damaged, or holds more than tensors, such as code to run; it was not "
            f"read: {reason}"
        ) from error


def _a_tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} is among the tensors")
    return value


def read_beside(
    source: Source, key: str, note: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """What is kept beside the weights under a key of BESIDE; empty where nothing is. ``note``:
    that of the weights, if it is known.

    Raises:
        FileError: it is damaged; or it is what a resumed training needs, and not there any more.
    """
    name = str((note_of(source) if note is None else note).get(key))
    if not re.fullmatch(rf"{BESIDE[key]}-[0-9a-f]{{16}}\.safetensors", name):
        return {}
    path = source.find(name)
    if path is None and key == "training":
        raise FileError(
            f"{source} was saved with {name}, which is not there any more, so its training cannot "
            "be resumed; load it with is_trainable=False, or restore the file"
        )
    if path is None:  # a start can be noted instead
        return {}
    return read(path)[0]
