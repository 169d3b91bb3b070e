"""PEFT's functions for EVA: how a model is called, and which rows of its layers' inputs count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.rows import first
from .options import EvaConfig


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a dictionary of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Which positions count, as indices (n, 2): not padding, and not those without a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"the dataloader gives a {type(model_input).__name__}, not a dictionary with "
            "input_ids; give prepare_model_inputs_fn, a function of your own, or None"
        )
    ids, wishes = model_input["input_ids"], EvaConfig.of(peft_config.eva_config)
    mask = model_input.get("attention_mask", torch.ones_like(ids)).bool()
    if wishes.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != wishes.label_mask_value)
    positions: Tensor = mask.nonzero()
    return positions


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """A layer's input at the positions that count, (n, in)."""
    return first(layer_input, layer_name)[tuple(model_input.mT)]
