"""What EVA has found, put into an adapter: each layer's own rank, alpha and A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..calibrate.layers import loras
from ..engine.inject import delete, inject
from ..engine.tree import hosts
from ..errors import warn
from ..methods.lora import LoRA
from ..model.functional import switch_of, user_model
from ..patterns import exact
from .noted import WAITING
from .options import EvaConfig


def begin(model: nn.Module, name: str, factors: Mapping[str, Tensor]) -> None:
    """Put the adapter in place again, with the ranks and the A of ``factors``."""
    user, switch = user_model(model), switch_of(model)
    adapted = {part.site.path: part for part in loras(model, name)}
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
    for host in hosts(user).values():
        host.set_requires_grad(name, name in before and not config.inference_mode)
    for part in loras(model, name):
        if part.site.path in factors:
            part.A.copy_(factors[part.site.path].reshape(part.A.shape))
        WAITING.discard(part)
    WAITING.difference_update(adapted.values())


def _redistributed(config: Any, adapted: Mapping[str, LoRA], factors: Mapping[str, Tensor]) -> Any:
    """A config with the ranks of ``factors``."""
    keep = EvaConfig.of(config.eva_config).adjust_scaling_factors
    ranks, alphas, out = {}, {}, []
    for path in adapted:
        here = config.at(path)
        r = len(factors[path]) if path in factors else here.r
        alpha = here.lora_alpha * r / here.r if keep and r != here.r else here.lora_alpha
        if r == 0:
            out.append(exact(path))
            continue
        name = "^" * any(p.endswith(f".{path}") for p in adapted) + exact(path)
        if r != config.r:
            ranks[name] = r
        if alpha != config.lora_alpha:
            alphas[name] = alpha
    if out:
        old = config.exclude_modules or ()
        known = [old] if isinstance(old, str) else [rf"(.*\.)?{exact(e)}" for e in old]
        config = replace(config, exclude_modules="|".join([*known, *out]))
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)
