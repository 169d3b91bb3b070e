"""Cartridges one behind the other, by PEFT's function."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import PeftConfig
from ..errors import FileError
from .cartridge import CartridgeConfig


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Write a cartridge whose keys and values are those of others, one behind the other.

    Args:
        adapter_paths: folders of two cartridges or more, of the same model.
        output_path: the folder of the new one; the frozen rows are those of the first.
        safe_serialization: PEFT's option; the format is always safetensors.

    Raises:
        ValueError: they are not two, or not alike, or a pickle is asked for.
        FileError: a folder holds no cartridge.
    """
    from ..files.folder import note_of, write
    from ..files.hub import Source
    from ..model.functional import load_peft_weights

    folders = [str(path) for path in adapter_paths]
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} adapters cannot be composed; give two or more")
    if not safe_serialization:
        raise ValueError("pickle files are not written; leave safe_serialization out")
    configs: list[Any] = [PeftConfig.from_pretrained(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            raise FileError(f"{folder} holds a {config.method} adapter, not a CARTRIDGE")
    first = configs[0]
    alike = "task_type token_dim num_layers num_attention_heads num_transformer_submodules".split()
    for folder, config in zip(folders, configs, strict=True):
        if other := [name for name in alike if getattr(config, name) != getattr(first, name)]:
            raise ValueError(
                f"{folder} has {other[0]}={getattr(config, other[0])!r} and {folders[0]} "
                f"{getattr(first, other[0])!r}; cartridges of one model can be composed"
            )
    rows = torch.cat([load_peft_weights(folder)["prompt_embeddings"] for folder in folders])
    made = replace(first, num_virtual_tokens=len(rows), inference_mode=True)
    note = {k: v for k, v in note_of(Source(folders[0])).items() if k == "identity"}
    write(Path(output_path), made, {"prompt_embeddings": rows}, note, {})
