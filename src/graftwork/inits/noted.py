"""Starts that were computed from the user's data beforehand, and noted at the layers.

The base weight stays what it is, so a note can be used again: by a second adapter, or to load a
file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..engine.site import Site
from ..errors import StateError

NOTE = "_graftwork_starts"  # name of the start -> A (r, in), B (out, r), power of the scale
PREPARE = {
    "corda": "preprocess_corda(model, config, run_model)",
    "lora_ga": "preprocess_loraga(model, config, train_step)",
}


def note(layer: nn.Module, how: str, a: Tensor, b: Tensor, power: float = 0.0) -> None:
    """Note at a layer how adapters of the start ``how`` will begin: with a / s^power and
    b / s^power, s the adapter's scale.
    """
    layer.__dict__.setdefault(NOTE, {})[how] = (a, b, power)


def noted(how: str) -> Callable[[Any, Site], tuple[Tensor, Tensor]]:
    """The start that was noted as ``how``."""

    def start(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
        found = site.layer.__dict__.get(NOTE, {}).get(how)
        if found is None:
            raise StateError(
                f"init_lora_weights={how!r} starts from data, and nothing was noted at {site.path}."
                f" Call {PREPARE[how]} on this very model first, with the data of the first time "
                "where a saved adapter is to be loaded: its file holds A and B beside a base "
                "weight from which this start was taken away. (If this base model is that changed "
                "one, give a config with init_lora_weights=True; an adapter saved with "
                "path_initial_model_for_weight_conversion needs nothing)"
            )
        *factors, power = found
        a, b = (f.to(site.raw.device) / adapter.scale**power for f in factors)
        if len(a) != adapter.r:
            raise StateError(
                f"the start {how!r} was computed for rank {len(a)} at {site.path}, and the adapter "
                f"has r={adapter.r} there; call {PREPARE[how]} with the config of the adapter"
            )
        return site.from_factors(a, b)

    return start
