"""Tensors in files that are no adapter's: a model's weights by name, and caches."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import FileError
from .hub import Source


class Weights:
    """The weights of a model as they are on this machine, by name.

    Args:
        model: the model.
        where: a folder or a safetensors file; by default where the model says that it came from.
    """

    def __init__(self, model: nn.Module, where: str | None) -> None:
        where = where or getattr(model, "name_or_path", None)
        if not where:
            raise FileError("give model_path: this model does not say where it came from")
        single = where.endswith(".safetensors")
        folder, name = os.path.split(where) if single else (where, "model.safetensors")
        self.source = Source(folder or ".", local_files_only=True)
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if path := self.source.find(name):
            with safe_open(path, framework="pt") as file:
                self.files: dict[str, Path | None] = dict.fromkeys(file.keys(), path)
            return
        index = self.source.find(f"{name}.index.json")
        if index is None:
            raise FileError(
                f"{self.source} has no {name} on this machine; give model_path, the folder of the "
                "model before it was quantised"
            )
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        self.files = {key: self.source.find(shard) for key, shard in shards.items()}

    def get(self, name: str) -> Tensor:
        """A weight, in fp32."""
        name = name if name in self.files else name.removeprefix(self.prefix)
        if (path := self.files.get(name)) is None:
            raise FileError(f"{self.source} has no weight {name}; is it this model's folder?")
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.float()


def cached(
    file: str | os.PathLike[str] | None,
    device: torch.device,
    compute: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The tensors of a cache of PEFT's, read without running code; where there is none, they are
    computed, and written there if a file is wished.
    """
    if file is not None and os.path.isfile(file) and os.path.getsize(file):
        tensors: dict[str, Tensor] = torch.load(file, device, weights_only=True)
        return tensors
    tensors = compute()
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
    return tensors
