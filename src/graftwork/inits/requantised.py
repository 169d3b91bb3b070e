"""LoftQ for a model that is quantised already: s B A = the leading directions of W - Q."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..engine.tree import hosts
from ..errors import FileError
from ..files.hub import Source
from ..methods.lora import LoRA
from ..model.functional import switch_of, user_model
from . import MATRICES
from .loftq import leading


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start the LoRAs of a quantised model with what quantising has lost.

    Args:
        peft_model: a quantised model with a LoRA.
        model_path: the folder or safetensors file of the model before it was quantised; by default
            where the model says that it came from.
        adapter_name: which adapter.
        callback: called with the model and a layer's path after its LoRA is replaced; False puts
            the old one back.

    Raises:
        FileError: the original weights are not on this machine.
        ValueError: no layer's weight differs from the original.
    """
    user, changed = user_model(peft_model), False
    originals = Originals(user, model_path)
    switch_of(peft_model).check((adapter_name,))
    for path, host in hosts(user).items():
        for key, part in host.parts_of(adapter_name):
            site = host.site_of(key)
            if site is None or type(site) not in MATRICES or not isinstance(part, LoRA):
                continue
            now = site.weight.float()
            lost = site.to_matrix(originals.get(f"{path}.weight")).to(now) - now
            if not lost.any():
                continue
            changed, old = True, (part.A.clone(), part.B.clone())
            for mine, factor in zip((part.A, part.B), leading(lost, part.r, site), strict=True):
                mine.copy_(factor / part.scale**0.5)
            if callback is not None and not callback(peft_model, path):
                part.A.copy_(old[0])
                part.B.copy_(old[1])
    if not changed:
        raise ValueError(
            f"no layer with the LoRA {adapter_name!r} has another weight than {originals.source}, "
            "so LoftQ has nothing to make up for; give a quantised model"
        )


class Originals:
    """A model's weights on disk, by name."""

    def __init__(self, model: nn.Module, where: str | None) -> None:
        where = where or getattr(model, "name_or_path", None)
        if not where:
            raise FileError("give model_path: this model does not say where it came from")
        folder, name = (
            os.path.split(where) if where.endswith(".safetensors") else (where, "model.safetensors")
        )
        self.source = Source(folder or ".", local_files_only=True)
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        if single := self.source.find(name):
            with safe_open(single, framework="pt") as file:
                self.files: dict[str, Path | None] = dict.fromkeys(file.keys(), single)
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
