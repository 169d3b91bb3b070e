"""One adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes
them; saving is atomic as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from ..config import CONFIG_NAME, PeftConfig
from ..errors import POLICY, FileError
from ..fast.shards import gather
from . import identity, schema
from .atomic import WEIGHTS as WEIGHTS
from .atomic import Saving, settled
from .bounded import content, parsed, shown
from .hub import Source
from .mapped import layout, read
from .pickled import unpickled
from .sharded import read_shards

PICKLE = "adapter_model.bin"
NOTE = "graftwork"  # the entry in the weights' header that is ours
BESIDE = {"training": "training_state", "start": "graftwork_start"}  # in that entry -> file


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
    with Saving(folder).begun() as saving:
        put(saving, "", config, tensors, note, beside)


def put(
    saving: Saving,
    within: str,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    note: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """One adapter among what is saved; ``within``: its folder there, the rest as of ``write``."""
    states = {key: to_bytes(_apart(t), {"format": "pt"}) for key, t in beside.items() if t}
    kept = {
        key: f"{BESIDE[key]}-{hashlib.sha256(state).hexdigest()[:16]}.safetensors"
        for key, state in states.items()
    }
    noted = {**note, "training": "", **kept}
    for key, name in kept.items():
        saving.put(os.path.join(within, name), states[key])
    saving.put(os.path.join(within, CONFIG_NAME), config.to_json().encode())
    header = {"format": "pt", NOTE: json.dumps(noted, sort_keys=True)}
    saving.put(os.path.join(within, WEIGHTS), to_bytes(_apart(tensors), header))
    saving.drop(within, [f"{stem}-*.safetensors" for stem in BESIDE.values()], kept.values())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which share memory."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise FileError(f"{name} is on the meta device, so it has no values; load them first")
        tensor = gather(name, tensor)
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out


def read_config(where: Any, subfolder: str | None = None, **options: Any) -> PeftConfig:
    """The config of an adapter, in its method's class.

    Raises:
        FileError: there is none, or it cannot be used.
    """
    return config_of(Source(where, subfolder, **options))


def config_of(source: Source) -> PeftConfig:
    """The config of a source."""
    return settled(source.at, lambda: _config_of(source))


def _config_of(source: Source) -> PeftConfig:
    path = source.find(CONFIG_NAME)
    if path is None:
        raise FileError(f"{source} has no {CONFIG_NAME}, so it is no adapter folder")
    return config_in(content(path), path)


def config_in(text: bytes, where: Any) -> PeftConfig:
    """The config that the text of a file says; ``where``: the file, for messages.

    Raises:
        FileError: it says none, or one that cannot be used.
    """
    from ..table import METHODS, method

    data = parsed(text, where)
    if not isinstance(data, dict) or "peft_type" not in data:
        raise FileError(
            f"{where} has no 'peft_type', so it is no adapter's config; give the folder that "
            "save_pretrained wrote"
        )
    if not isinstance(kind := data["peft_type"], str) or kind not in METHODS:
        raise FileError(
            f"{where} is of the method {shown(kind)}; this version has {sorted(METHODS)}"
        )
    cls = method(kind).config
    data = schema.checked(cls, data, where)
    try:
        return cls.from_fields(data, str(where))
    except (TypeError, ValueError) as error:
        raise FileError(f"{where} cannot be used: {str(error)[:2000]}") from error


def note_of(source: Source) -> dict[str, Any]:
    """What this library noted in the header of the weights; empty for files of others."""
    path = source.find(WEIGHTS)
    if path is None:
        return {}
    return _note(layout(path).metadata)


def _note(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        note = parsed(metadata.get(NOTE, "{}").encode(), NOTE)
    except (FileError, UnicodeEncodeError):
        return {}
    if not isinstance(note, dict):
        return {}
    texts = {key: note[key] for key in ("config", *BESIDE) if isinstance(note.get(key), str)}
    return texts | {"identity": identity.checked(note.get("identity"))}


class Contents:
    """The weights of an adapter and the note in their header, for which the file is read once."""

    def __init__(self, source: Source, allow_pickle: bool = False) -> None:
        self.source, self.allow_pickle = source, allow_pickle

    @cached_property
    def file(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What the files of weights hold, where there are any in the format of safetensors."""
        if (path := self.source.find(WEIGHTS)) is not None:
            return read(path)
        sharded = read_shards(self.source)
        return None if sharded is None else (sharded, {})

    @property
    def note(self) -> dict[str, Any]:
        """As of ``note_of``."""
        return {} if self.file is None else _note(self.file[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As of ``read_tensors``."""
        if self.file is None:
            return _unpickled(self.source, self.allow_pickle)
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
    found = settled(source.at, lambda: Contents(source, allow_pickle).tensors)
    return {name: tensor.to(device or "cpu") for name, tensor in found.items()}


def _unpickled(source: Source, allow_pickle: bool) -> dict[str, Tensor]:
    pickled = source.find(PICKLE)
    if pickled is None:
        raise FileError(f"{source} has neither {WEIGHTS} nor {PICKLE}, so it is no adapter folder")
    if not (allow_pickle or POLICY.lenient):
        raise FileError(
            f"{source} has its weights in {PICKLE}, a pickle, which can carry code. If you trust "
            "it, pass allow_pickle=True, and save it again to have it as safetensors"
        )
    return unpickled(pickled, "cpu")


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
