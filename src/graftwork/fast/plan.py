"""What a layer is to compute with some adapters: whether it can take the fast path, with which
weight, and their updates as one.

All of it is asked in every forward: nothing is remembered that somebody may have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .plain import PLAIN

if TYPE_CHECKING:
    from ..engine.adapter import Adapter
    from ..engine.host import LayerHost


class Update(NamedTuple):
    """B A of all adapters at a layer, and what they add to the bias."""

    a: tuple[Tensor, ...]
    b: Tensor
    k: float  # by what B A is to be multiplied, for dropout too
    shift: Tensor | None
    gain: Tensor | None  # what the layer and B A are scaled by; the bias is added after it
    rate: float  # of dropout


class Own(NamedTuple):
    """How a layer computes its own product: weight (out, in), None where only its own code can do
    it, and bias (out,).
    """

    w: Tensor | None
    bias: Tensor | None


@dataclass
class Refused:
    """Why a layer has to take the plain path."""

    why: str


def rate_of(host: LayerHost, parts: Sequence[Adapter]) -> float | Refused:
    """The dropout that a layer's adapters have in common, or why it has to take the plain path."""
    site, rank, rate = host.site, 0, 0.0
    if not site.product:
        return Refused(f"the layer, {type(host.base_layer).__name__}, is not linear")
    for i, part in enumerate(parts):
        if not part.sums:
            return Refused(f"{type(part).__name__} is more than the layer plus a low-rank product")
        if part.scales and len(parts) > 1:
            return Refused(f"{type(part).__name__} scales other adapters too")
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            return Refused("the adapter has hooks")
        if part.skip and part.training:
            return Refused("it is left out of some forwards")
        drop = part.rate()
        if drop is None or (i and drop != rate):
            return Refused("its dropout is not one rate for the whole input")
        rank, rate = rank + (part.rank() or 0), drop
    out, in_ = site.shape
    if rank * (out + in_) >= out * in_:
        return Refused("a dense update is cheaper at this rank")
    return rate


def own_weight(host: LayerHost) -> Tensor | Refused:
    """The weight of a layer whose product can be computed here, as it is stored; else why not."""
    layer: Any = host._modules["base_layer"]
    weight = host.originals.get("weight", layer._parameters.get("weight"))
    if not host.site.usual(layer):
        return Refused(f"a {type(layer).__name__} has a forward of its own")
    if type(weight) not in PLAIN or not weight.is_floating_point():
        kind = "nothing" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        return Refused(f"its weight is {kind}")
    if weight.requires_grad:
        return Refused("its weight is trained")
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return Refused("it has hooks") if hooks or layer._backward_pre_hooks else weight


def own(host: LayerHost) -> Own:
    """How a layer computes its own product now."""
    weight = own_weight(host)
    if isinstance(weight, Refused):
        return Own(None, None)
    layer: Any = host._modules["base_layer"]
    bias = host.originals.get("bias", layer._parameters.get("bias"))
    return Own(host.site.to_matrix(weight), bias)


def combined(host: LayerHost, parts: Sequence[Adapter], rate: float) -> Update:
    """The updates of all adapters of a layer as one."""
    up = 1.0 if not rate else 1 / (1 - rate) if rate < 1 else 0.0
    if len(parts) == 1:
        part = parts[0]
        a, b, k, shift = part.terms()
        gain = part.multiplier(host.site.weight) if part.scales else None
        return Update((a,), b, k * up, shift, gain, rate)
    terms = [part.terms() for part in parts]
    b = torch.cat([one[2] * one[1] for one in terms], 1)
    shifts = [one[3] for one in terms if one[3] is not None]
    total = torch.stack(shifts).sum(0) if shifts else None
    return Update(tuple(one[0] for one in terms), b, up, total, None, rate)


def path(host: Any, part: Adapter) -> str:
    """Which path a layer takes with one adapter, and why not the fast one, for reports."""
    if getattr(host, "site", None) is None:
        return "plain: its module's own code reads the weights"
    if part.native and host.site.product:
        return "fast"
    rate, weight = rate_of(host, [part]), own_weight(host)
    if isinstance(rate, Refused):
        return f"plain: {rate.why}"
    if not isinstance(weight, Refused):
        return "fast"
    if part.scales:
        return f"plain: {weight.why}"
    return f"fast, after the layer's own product: {weight.why}"
