"""Which layers the data are to tell of: those that a config means, or those of an adapter."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..engine.site import Site, Standing, kind_of
from ..engine.tree import hosts
from ..inits import MATRICES
from ..methods.lora import LoRA
from ..model.functional import switch_of, user_model
from ..targets.match import Match
from ..targets.offer import Offer


def layers_of(model: nn.Module, config: Any) -> dict[str, Site]:
    """The layers that a config means and whose inputs are rows of a matrix, by path.

    Raises:
        ValueError: there are none.
    """
    config, offer = copy.deepcopy(config), Offer(user_model(model))
    config.prepare(offer)
    config.target_modules = Match(offer, config).resolved()
    places = {t.path: t.module for t in Match(offer, config).targets() if t.parameter is None}
    kinds = {path: kind_of(module) for path, module in places.items()}
    found = {p: kind(Standing(places[p], p)) for p, kind in kinds.items() if kind in MATRICES}
    if not found:
        raise ValueError(
            f"none of {sorted(places)[:4]} is a linear layer or a Conv1D, and only those start "
            f"from data. {offer.table()}"
        )
    return found


def adapted(model: nn.Module, config: Any, name: str) -> tuple[dict[str, Site], Any]:
    """The same for an adapter that is there, and its config; else for the config that is given.

    Raises:
        ValueError: the model has no adapters, and no config is given.
    """
    if hosts(user_model(model)):
        switch = switch_of(model)
        switch.check((name,))
        sites = [part.site for part in loras(model, name) if type(part.site) in MATRICES]
        return {site.path: site for site in sites}, config or switch.configs[name]
    if config is None:
        raise ValueError("give peft_config, or a model that has the adapter")
    return layers_of(model, config), config


def loras(model: nn.Module, name: str | None = None) -> list[LoRA]:
    """The LoRAs in a model, of one adapter or of all."""
    every = [(n, host) for host in hosts(user_model(model)).values() for n in host.adapters]
    parts = [part for n, host in every if name in (None, n) for _, part in host.parts_of(n)]
    return [part for part in parts if isinstance(part, LoRA)]
