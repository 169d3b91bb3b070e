"""EVA (arXiv 2410.07170): A = the leading right singular vectors of a layer's inputs, B = 0; the
ranks go to the layers whose directions explain the largest share of their inputs' variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.layers import adapted
from ..calibrate.rows import Data, Forward, Hint, Rows
from ..errors import StateError
from ..files.codec import PREFIX
from ..model.functional import switch_of
from .batches import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .eva_ranks import begin
from .options import EvaConfig
from .survey import surveyed


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: Hint | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Rows = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The A (rank, in) that EVA finds for every layer, by the layer's name in ``model``.

    Args:
        model: a model with the adapter, or any model together with ``peft_config``.
        dataloader: batches; gone through again until the directions have converged.
        peft_config: the adapter's config, where the model does not have it yet.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: (batch, config) -> what the next function is given.
        prepare_layer_inputs_fn: (layer's inputs, that, layer's name) -> rows (n, in); also one
            function for each layer's name; None takes all rows.
        adapter_name: which adapter.
        gather_distributed_inputs: collect the rows of all processes.
        show_progress_bar: PEFT's option; nothing is printed.

    Raises:
        ValueError: there are too few data.
        TrainingError: the directions do not settle.
    """
    layers, config = adapted(model, peft_config, adapter_name)
    wishes = EvaConfig.of(config.eva_config)
    data = Data(
        model, layers, dataloader, replace(config, eva_config=wishes), forward_fn,
        prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs,
    )  # fmt: skip
    found = surveyed(data, wishes.rho, wishes.tau).factors(wishes.whiten)
    return {data.names[path]: a for path, a in found.items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: Hint | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Rows = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with ``init_lora_weights="eva"`` from data, before any optimizer is made.

    Ranks change, and layers that get none lose their adapter; the config says so in
    ``rank_pattern``, ``alpha_pattern`` and ``exclude_modules``. ``eva_state_dict`` is what
    ``get_eva_state_dict`` gave, instead of data; the other arguments are as there.

    Raises:
        ValueError: the adapter has another start, or there are no data.
    """
    switch = switch_of(model)
    switch.check((adapter_name,))
    how = switch.configs[adapter_name].init_lora_weights  # type: ignore[attr-defined]
    if len(switch.active) > 1:
        raise StateError(
            f"EVA needs one active adapter, not {list(switch.active)}: "
            f"set_adapter({adapter_name!r})"
        )
    if how != "eva":
        raise ValueError(
            f"{adapter_name!r} has init_lora_weights={how!r}; EVA is for an adapter whose config "
            "says init_lora_weights='eva'"
        )
    if eva_state_dict is None and dataloader is None:
        raise ValueError("give dataloader, or the eva_state_dict that get_eva_state_dict made")
    factors = eva_state_dict or get_eva_state_dict(
        model, dataloader or (), None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn,
        adapter_name, gather_distributed_inputs, show_progress_bar,
    )  # fmt: skip
    begin(model, adapter_name, {k.removeprefix(PREFIX): a for k, a in factors.items()})
