"""EVA (arXiv 2410.07170): A = the leading right singular vectors of a layer's inputs, B = 0; the
ranks go to the layers whose directions explain the largest share of their inputs' variance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inject import inject
from ..engine.root import delete
from ..engine.site import Site
from ..engine.tree import hosts
from ..errors import StateError, TrainingError, warn
from ..files.codec import PREFIX
from ..methods.lora import LoRA
from ..model.functional import switch_of, user_model
from . import MATRICES, observe
from .batches import (
    Data,
    Forward,
    ModelInputs,
    Rows,
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .directions import Survey
from .options import EvaConfig

PASSES = 100  # over the data, after which directions that still turn will not settle


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
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
    layers, config = _layers(model, peft_config, adapter_name)
    wishes = EvaConfig.of(config.eva_config)
    config = replace(config, eva_config=wishes)
    data = Data(
        model, layers, dataloader, config, forward_fn, prepare_model_inputs_fn,
        prepare_layer_inputs_fn, gather_distributed_inputs,
    )  # fmt: skip
    with observe.base_only(model, training=False):
        ranks = {path: config.at(path).r for path in layers}
        widths = {path: site.shape[1] for path, site in layers.items()}
        survey = Survey(ranks, widths, data.marks(), wishes.rho, wishes.tau)
        _settle(survey, data)
    return {data.names[p]: a for p, a in survey.factors(wishes.whiten).items()}


def _settle(survey: Survey, data: Data) -> None:
    for _ in range(PASSES):
        for batch in data:
            if not (turning := survey.turning()):
                return
            data.run(batch, turning, survey.add)
            survey.distribute()
        if unseen := survey.unseen():
            raise ValueError(
                f"no batch has as many rows as {unseen[0]} may get directions "
                f"({survey.first[unseen[0]].k}, its rank times rho); give larger batches, or a "
                "smaller r or rho"
            )
    raise TrainingError(
        f"after {PASSES} passes over the data the directions of {survey.turning()[0]} still turn; "
        "give more data, or a smaller tau"
    )


def _layers(model: nn.Module, config: Any, name: str) -> tuple[dict[str, Site], Any]:
    """The linear layers of an adapter, or of one that a config would make; and the config."""
    every = hosts(user_model(model))
    if not every and config is None:
        raise ValueError("give peft_config, or a model that has the adapter")
    if not every:
        return observe.sites(model, config), config
    configs, found = switch_of(model).configs, {}
    switch_of(model).check((name,))
    for path, host in every.items():
        for key, part in host.parts_of(name):
            site = host.site_of(key)
            if site is not None and type(site) in MATRICES and isinstance(part, LoRA):
                found[path] = site
    return found, config or configs[name]


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Rows = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with ``init_lora_weights="eva"`` from data, before any optimizer is made.

    Ranks change, and layers that get none lose their adapter; the config says so in
    ``rank_pattern``, ``alpha_pattern`` and ``exclude_modules``.

    Args:
        model: a model with the adapter.
        dataloader: see ``get_eva_state_dict``, as for the other arguments.
        eva_state_dict: what that function gave, instead of data.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: see there.
        prepare_layer_inputs_fn: see there.
        adapter_name: which adapter.
        gather_distributed_inputs: collect the rows of all processes.
        show_progress_bar: PEFT's option; nothing is printed.

    Raises:
        ValueError: the adapter has another start, or there are no data.
    """
    switch = switch_of(model)
    switch.check((adapter_name,))
    config: Any = switch.configs[adapter_name]
    if len(switch.active) > 1:
        raise StateError(
            f"EVA needs one active adapter, not {list(switch.active)}: "
            f"set_adapter({adapter_name!r})"
        )
    if config.init_lora_weights != "eva":
        raise ValueError(
            f"{adapter_name!r} has init_lora_weights={config.init_lora_weights!r}; EVA is for an "
            "adapter whose config says init_lora_weights='eva'"
        )
    if eva_state_dict is None and dataloader is None:
        raise ValueError("give dataloader, or the eva_state_dict that get_eva_state_dict made")
    factors = eva_state_dict or get_eva_state_dict(
        model, dataloader or (), None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn,
        adapter_name, gather_distributed_inputs, show_progress_bar,
    )  # fmt: skip
    _begin(model, adapter_name, {k.removeprefix(PREFIX): a for k, a in factors.items()})


def _begin(model: nn.Module, name: str, factors: Mapping[str, Tensor]) -> None:
    """Put the adapter in place again, with the ranks and the A of ``factors``."""
    user, switch = user_model(model), switch_of(model)
    adapted = {
        path: part
        for path, host in hosts(user).items()
        for _, part in host.parts_of(name)
        if isinstance(part, LoRA)
    }
    if unknown := set(factors) - set(adapted):
        raise ValueError(
            f"eva_state_dict has {sorted(unknown)[0]}, where {name!r} has no LoRA; compute it with "
            "this adapter's config"
        )
    if plain := sorted(set(adapted) - set(factors)):
        warn(f"EVA says nothing about {plain}; they start with B = 0 and a random A")
    config = _redistributed(switch.configs[name], adapted, factors)
    before, trainable = switch.active, switch.trainable
    wide = all(part.dtype.itemsize >= 4 for part in adapted.values())
    switch.activate(())  # the one that is deleted has no successor
    delete(user, switch, (name,))
    inject(user, config, name, switch, autocast=wide)
    switch.trainable = trainable
    switch.activate(before)
    for path, host in hosts(user).items():
        host.set_requires_grad(name, name in before and not config.inference_mode)
        for _, part in host.parts_of(name):
            if isinstance(part, LoRA) and path in factors:
                part.A.copy_(factors[path].reshape(part.A.shape))


def _redistributed(config: Any, adapted: Mapping[str, LoRA], factors: Mapping[str, Tensor]) -> Any:
    """A config with the ranks of ``factors``."""
    keep = EvaConfig.of(config.eva_config).adjust_scaling_factors
    ranks, alphas, out = {}, {}, []
    for path in adapted:
        here = config.at(path)
        r = len(factors[path]) if path in factors else here.r
        alpha = here.lora_alpha * r / here.r if keep and r != here.r else here.lora_alpha
        if r == 0:
            out.append(re.escape(path))
            continue
        name = f"^{path}" if any(p.endswith(f".{path}") for p in adapted) else path
        if r != config.r:
            ranks[name] = r
        if alpha != config.lora_alpha:
            alphas[name] = alpha
    if out:
        old = config.exclude_modules or ()
        known = [old] if isinstance(old, str) else [rf"(.*\.)?{re.escape(e)}" for e in old]
        config = replace(config, exclude_modules="|".join([*known, *out]))
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)
