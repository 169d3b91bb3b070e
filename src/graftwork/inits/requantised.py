"""LoftQ for a model that is quantised already: s B A = the leading directions of W - Q."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..calibrate.layers import loras
from ..files.tensors import Weights
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
    originals, changed = Weights(user_model(peft_model), model_path), False
    switch_of(peft_model).check((adapter_name,))
    parts = loras(peft_model, adapter_name)
    for part, site in [(p, p.site) for p in parts if type(p.site) in MATRICES]:
        now = site.weight.float()
        lost = site.to_matrix(originals.get(f"{site.path}.weight")).to(now) - now
        if not lost.any():
            continue
        changed, old = True, (part.A.clone(), part.B.clone())
        for mine, factor in zip((part.A, part.B), leading(lost, part.r, site), strict=True):
            mine.copy_(factor / part.scale**0.5)
        if callback is not None and not callback(peft_model, site.path):
            part.A.copy_(old[0])
            part.B.copy_(old[1])
    if not changed:
        raise ValueError(
            f"no layer with the LoRA {adapter_name!r} has another weight than {originals.source}, "
            "so LoftQ has nothing to make up for; give a quantised model"
        )
