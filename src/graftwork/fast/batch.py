"""A mixed batch at one host: in one pass where its adapters allow that, else one by one."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from . import choose, mix, plan
from .plain import watched
from .rows import expand, join, take, tensors_in

TOGETHER = ("",)  # instead of names: the rows that share one pass; a name is never empty


def split(host: Any, rows: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each row with its own adapter; the rows of one adapter run together."""
    n = next((len(t) for t in tensors_in((args, kwargs)) if t.ndim), 0)
    if not n:
        raise StateError(
            f"{host.path} received no tensor, so adapter_names cannot be applied to its rows"
        )
    groups: dict[tuple[str, ...], list[int]] = {}
    owners = expand(rows, n, host.path)
    lanes = {name: host.lane(name) for name in dict.fromkeys(owners)}
    for i, name in enumerate(owners):
        groups.setdefault(lanes[name], []).append(i)
    if len(groups) == 1:
        return host.choose(next(iter(groups)), args, kwargs)
    device, call = next(host.parameters()).device, host.switch.current()
    parts, order = [], []
    for names, index in groups.items():
        where = torch.tensor(index, device=device)
        context = take(call.context, where // (n // len(rows)), len(rows))
        if n != len(rows):  # values that were made for this call's own inputs
            context = take(context, where, n)
        own = tuple(owners[i] for i in index)  # for the hosts within this one
        choose.STATE.split = host
        with host.switch.call(call.active, own, **context):
            taken = take(args, where, n), take(kwargs, where, n)
            together = names == TOGETHER
            parts.append(host.mixed(own, *taken) if together else host.choose(names, *taken))
        order.extend(index)
    choose.STATE.split = None
    return join(parts, torch.tensor(order, device=device).argsort())


def joint(
    host: Any, rows: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """One pass for all rows; None where an adapter does more than add a product or scale."""
    x: Any = args[0] if args else kwargs.get("input")
    if not (_open(host) and isinstance(x, Tensor) and x.ndim > 1 and x.is_floating_point()):
        return None
    if choose.STATE.split is not host:  # else x is some rows of what the layer was given
        choose.STATE.given = weakref.ref(x)
    named, dtype = {k: v for k, v in kwargs.items() if k != "input"}, host.dtypes(x)[1] or x.dtype

    def base(x: Tensor) -> Tensor:
        y: Tensor = host.base(x, *args[1:], **named)
        y = y if y.dtype == dtype else y.to(dtype)
        return y.clone() if host.base_layer._forward_hooks else y  # which may hold it

    def own() -> plan.Own:
        more = len(args) > 1 or named or x.dtype != dtype or not host.site.product or watched(x)
        found = plan.Own(None, None) if more else plan.own(host)
        return found if found.w is None or found.w.dtype == dtype else plan.Own(None, None)

    batch = host.switch.batch(rows, x, host.path)
    return mix.layer(host.stacks, batch, host.adapters._modules, host.alone, x, base, dtype, own)


def _open(host: Any) -> bool:
    return host.site.pointwise and host.site.linear and not host.merged_adapters


def joins(host: Any, name: str) -> bool:
    """Whether a row of this name can be in one pass with others."""
    return _open(host) and mix.closed(host.alone(name)) is not None
