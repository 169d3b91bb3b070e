"""Tensors in files that are no adapter's: a model's weights by name, and caches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FileError
from .bounded import weight_map
from .hub import Source
from .mapped import layout, opened
from .pickled import unpickled


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
            self.files: dict[str, Path | None] = dict.fromkeys(layout(path).entries, path)
            return
        index = self.source.find(f"{name}.index.json")
        if index is None:
            raise FileError(
                f"{self.source} has no {name} on this machine; give model_path, the folder of the "
                "model before it was quantised"
            )
        shards = weight_map(index)
        paths = {shard: self.source.find(shard) for shard in dict.fromkeys(shards.values())}
        self.files = {key: paths[shard] for key, shard in shards.items()}

    def get(self, name: str) -> Tensor:
        """A weight, in fp32."""
        name = name if name in self.files else name.removeprefix(self.prefix)
        if (path := self.files.get(name)) is None:
            raise FileError(f"{self.source} has no weight {name}; is it this model's folder?")
        with opened(path) as file:
            if name not in file.keys():
                raise FileError(f"{path} has no weight {name}, which its index names")
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
        return unpickled(Path(file), device)
    tensors = compute()
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
    return tensors
