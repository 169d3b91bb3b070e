"""Starts from the user's data: noted at the layers beforehand, or awaited by the adapters.

The base weight stays what it is, so a note can be used again: by a second adapter, or to load a
file that does not hold its start.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..engine.site import Site
from ..errors import StateError, warn
from . import plain

NOTE = "_graftwork_starts"  # name of the start -> A (r, in), B (out, r), power of the scale
PREPARE = {
    "corda": "preprocess_corda(model, config, run_model)",
    "lora_ga": "preprocess_loraga(model, config, train_step)",
}
WAITING: weakref.WeakSet[Any] = weakref.WeakSet()  # adapters that began plainly, until data come
_HOOKED: list[Any] = []


def asked(how: str, config: Any) -> None:
    """Refuse a config that names another start than the one that is being computed."""
    if config.init_lora_weights != how:
        raise ValueError(
            f"the config has init_lora_weights={config.init_lora_weights!r}, so what is computed "
            f"here would have no effect; give one with init_lora_weights={how!r}"
        )


def note(layer: nn.Module, how: str, a: Tensor, b: Tensor, power: float = 0.0) -> None:
    """Note how adapters with the scale s begin at a layer: with a / s^power and b / s^power."""
    layer.__dict__.setdefault(NOTE, {})[how] = (a, b, power)


def noted(how: str, adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """The start that was noted as ``how``."""
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


def waiting(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """A plain start, until ``initialize_lora_eva_weights`` comes; training without it is told."""
    WAITING.add(adapter)
    if not _HOOKED:
        _HOOKED.append(register_optimizer_step_pre_hook(_remind))
    return plain.kaiming(adapter, site)


def _remind(optimizer: Optimizer, *_: Any) -> None:
    if not WAITING:
        return
    held = {id(p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None}
    late = [part for part in WAITING if held.intersection(map(id, part.parameters()))]
    if late:
        warn(
            "an adapter with init_lora_weights='eva' trains, and initialize_lora_eva_weights was "
            f"not called, so its {len(late)} layers, such as {min(p.site.path for p in late)}, "
            "began as those of a plain LoRA. Call initialize_lora_eva_weights(model, dataloader) "
            "between get_peft_model and the making of the optimizer, or leave 'eva' out"
        )
    WAITING.difference_update(late)
