"""PEFT's verbs on a layer that weight an adapter there, as diffusers uses them."""

from __future__ import annotations

import math

from torch import Tensor

from ..engine.adapter import Adapter
from ..engine.host import Host
from ..errors import StateError
from .layer import verb


@verb
def set_scale(host: Host, adapter: str, scale: float) -> None:
    """Weight an adapter's update here: ``scale`` times what its config says; nothing where the
    adapter is not at this layer.
    """
    for key, part in host.parts_of(adapter):
        if not part.replaces:
            put(part, scale * _configured(host, adapter, key))


@verb
def scale_layer(host: Host, scale: float) -> None:
    """Multiply the present weight of the active adapters here."""
    for name in host.switch.active:
        for key, part in host.parts_of(name) if scale != 1 else ():
            if not part.replaces:
                _configured(host, name, key)
                put(part, scale * part.scale)


@verb
def unscale_layer(host: Host, scale: float | None = None) -> None:
    """Divide the present weight of the active adapters here; None: back to the config's."""
    for name in host.switch.active:
        if scale is None:
            set_scale(host, name, 1.0)
        elif scale != 1:
            scale_layer(host, 1 / scale)
            return


def _configured(host: Host, name: str, key: str) -> float:
    """The scale that an adapter's config gives its part at a layer."""
    site = host.site_of(key)
    config = host.switch.configs[name].at(host.path, "weight" if site is None else site.parameter)
    alpha = getattr(config, "lora_alpha", getattr(config, "alpha", None))
    rank = getattr(config, "r", None)
    if not alpha or not rank:
        raise StateError(
            f"the {config.method} {name!r} at {host.path} has no scale that could be set: only "
            "methods with an alpha and a rank have one. Leave its weight at 1"
        )
    return float(alpha / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank))


def put(part: Adapter, value: float | Tensor) -> None:
    """Give an adapter another scale, in the place that compiled code holds where there is one."""
    if isinstance(part.scale, Tensor):  # prepared for hot-swapping
        part.scale.copy_(value if isinstance(value, Tensor) else part.scale.new_tensor(value))
    else:
        part.scale = value
