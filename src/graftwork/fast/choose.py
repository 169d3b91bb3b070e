"""Which path a layer's forward takes: the fast one where it computes the same, or the plain one.

It knows of methods only what they say of themselves in ``Adapter.terms``. Layers that read the same
input one after another, such as q, k and v, are known by their names; that they do is seen by the
tensor that each is given. Nothing is learned from forward to forward: the first one has the bits of
all others, so that a training that is resumed goes on as it would have.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bits import Dropped, Mask, Reading, reading
from .linear import flat, follow, lead, shrink
from .plain import PLAIN, traced, watched
from .scale import Scaled

if TYPE_CHECKING:
    from ..engine.adapter import Adapter
    from ..engine.host import LayerHost
    from ..engine.switch import Call, Switch


@dataclass
class Pending:
    """What a leader has computed for the layers that read the same input next."""

    call: Call
    x: Tensor  # the input as the layers are given it
    version: int
    alias: Tensor  # and as the next of them has to take it
    mask: Mask | None
    share: bool
    rest: list[tuple[LayerHost, Update, Tensor]]  # what is left: the layer, its factors, x A'


@dataclass
class Update:
    """B A of all adapters at a layer, and what they add to the bias."""

    a: tuple[Tensor, ...]
    b: Tensor
    k: float  # by what B A is to be multiplied, for dropout too
    shift: Tensor | None
    gain: Tensor | None  # what the layer and B A are scaled by
    rate: float  # of dropout

    @property
    def scales(self) -> bool:
        """Whether the bias is added after the gain."""
        return self.gain is not None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.pending: Pending | None = None
        self.last: Reading | None = None  # who drops what
        self.given: weakref.ref[Tensor] | None = None  # what a layer got for a mixed batch
        self.split: Any = None  # the layer that runs such a batch in groups just now


STATE = _Thread()
# the layers of a module that read one input, in the order in which they are called
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)  # where q reads another one
# leader -> the layers that follow it
FOLLOWERS: weakref.WeakKeyDictionary[LayerHost, tuple[weakref.ref[LayerHost], ...]]
FOLLOWERS = weakref.WeakKeyDictionary()
LINKED: weakref.WeakSet[Switch] = weakref.WeakSet()  # whose layers are in there


def link(switch: Switch, hosts: Callable[[], Mapping[str, Any]]) -> None:
    """Find out which layers of a model read one input, by their names, where that is not known.

    Args:
        switch: the model's.
        hosts: gives its hosts by path.
    """
    if torch.compiler.is_compiling() or switch in LINKED:
        return
    places = hosts()
    for path, host in places.items():
        parent, _, name = path.rpartition(".")
        own: list[Any] = []
        for names in TOGETHER:
            least = 1 if CROSS.search(parent) and len(names) == 3 else 0
            if name in names and (i := names.index(name)) >= least:
                own = [places.get(f"{parent}.{n}" if parent else n) for n in names[i + 1 :]]
        FOLLOWERS[host] = tuple(weakref.ref(other) for other in own if other is not None)
    LINKED.add(switch)


def reason(host: LayerHost, parts: Sequence[Adapter]) -> str:
    """Why a layer with these adapters has to take the plain path; empty where it has not."""
    site, rank, rate = host.site, 0, 0.0
    if not site.product:
        return f"the layer, {type(host.base_layer).__name__}, is not linear"
    for i, part in enumerate(parts):
        if not part.sums:
            return f"{type(part).__name__} is more than the layer plus a low-rank product"
        if part.scales and len(parts) > 1:
            return f"{type(part).__name__} scales other adapters too"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            return "the adapter has hooks"
        drop = part.rate()
        if drop is None or (i and drop != rate):
            return "its dropout is not one rate for the whole input"
        rank, rate = rank + (part.rank() or 0), drop
    out, in_ = site.shape
    return "a dense update is cheaper at this rank" if rank * (out + in_) >= out * in_ else ""


def own_weight(host: LayerHost) -> Tensor | str:
    """The weight of a layer whose product can be computed here, as it is stored; else why not."""
    layer: Any = host._modules["base_layer"]
    weight = host.originals.get("weight", layer._parameters.get("weight"))
    if not host.site.usual(layer):
        return f"a {type(layer).__name__} has a forward of its own"
    if type(weight) not in PLAIN or not weight.is_floating_point():
        kind = "nothing" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        return f"its weight is {kind}"
    if weight.requires_grad:
        return "its weight is trained"
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return "it has hooks" if hooks or layer._backward_pre_hooks else weight


def path(host: Any, part: Adapter) -> str:
    """Which path a layer takes with one adapter, and why not the fast one, for reports."""
    if getattr(host, "site", None) is None:
        return "plain: its module's own code reads the weights"
    if part.native and host.site.product:
        return "fast"
    if why := reason(host, [part]):
        return f"plain: {why}"
    weight = own_weight(host)
    if not isinstance(weight, str):
        return "fast"
    return f"plain: {weight}" if part.scales else f"fast, after the layer's own product: {weight}"


def run(
    host: LayerHost, parts: Sequence[Adapter], x: Tensor, base: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The layer's output with these adapters; None where the plain path has to be taken.

    Args:
        host: where the layer stood.
        parts: the adapters, all to be added.
        x: the input, (..., in).
        base: the layer's own forward.
    """
    if watched(x) or not x.is_floating_point():
        return None
    kind, free = x.device.type, torch.is_autocast_enabled(x.device.type)
    pending = STATE.pending
    if pending is not None and pending.x is x:
        for i, (one, update, s) in enumerate(pending.rest):
            if one is host and pending.version == version(x):
                if pending.call is not host.switch.current():
                    break
                _mask(host, x, x, update.rate)
                del pending.rest[i]
                with torch.autocast(kind, enabled=False) if free else nullcontext():
                    y = _follow(pending, update, s, _own(host, base))
                STATE.pending = pending if pending.rest else None
                return y
    if reason(host, parts) or any(part.skip and part.training for part in parts):
        return None
    own = _own(host, base)
    if own.w is None and (free or parts[0].scales):
        return None  # the layer casts by itself; its bias is within what it gives
    if not free:
        same = own.w is None or own.w.dtype is x.dtype  # else torch will say so
        return _lead(host, combined(host, parts), x, x, own) if same else None
    with torch.autocast(kind, enabled=False):
        cast = x.to(torch.get_autocast_dtype(kind))
        return _lead(host, combined(host, parts), x, cast, own)


@dataclass
class Own:
    """How a layer computes its own product.

    Args:
        w: the weight (out, in); None where only its own code can do it.
        bias: (out,).
        call: its own code.
    """

    w: Tensor | None
    bias: Tensor | None
    call: Callable[[Tensor], Tensor]


def _own(host: LayerHost, base: Callable[[Tensor], Tensor]) -> Own:
    weight = own_weight(host)
    if isinstance(weight, str):
        return Own(None, None, base)
    layer: Any = host._modules["base_layer"]
    bias = host.originals.get("bias", layer._parameters.get("bias"))
    return Own(host.site.to_matrix(weight), bias, base)


def combined(host: LayerHost, parts: Sequence[Adapter]) -> Update:
    """The updates of all adapters of a layer as one."""
    rate = parts[0].rate() or 0.0
    up = 1 / (1 - rate) if rate < 1 else 0.0
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


def finished(y: Tensor, update: Update, own: Own) -> Tensor:
    """An output with what is added to the bias, or scaled."""
    if update.gain is not None:
        y = Scaled.apply(y, update.gain, own.bias)  # type: ignore[no-untyped-call]
    return y if update.shift is None else y + update.shift.to(y.dtype)


def _lead(host: LayerHost, update: Update, given: Tensor, x: Tensor, own: Own) -> Tensor:
    call = host.switch.current()
    others = [] if call.rows is not None else list(_followers(host, update, given, call))
    mask = _mask(host, given, x, update.rate)
    every = [update, *(theirs for _, theirs in others)]
    a = [one.a[0] if len(one.a) == 1 else torch.cat(one.a) for one in every]
    share = own.w is not None and given.requires_grad and torch.is_grad_enabled()
    alias = x
    if own.w is None:
        found = shrink(mask, x, *a)
        s, *more = found if others else (found,)
        y = _onto(x, s, update, own)
    else:
        bias = None if update.scales else own.bias
        found = lead(mask, share, update.k, x, own.w, bias, update.b, *a)
        y, again, *more = found if others else (found, None)
        alias = x if again is None else again
        y = finished(y, update, own)
    if others:
        rest = [(one, theirs, s) for (one, theirs), s in zip(others, more, strict=True)]
        STATE.pending = Pending(call, given, version(given), alias, mask, share, rest)
    return y


def _onto(x: Tensor, s: Tensor, update: Update, own: Own) -> Tensor:
    """The layer's own output, however it computes it, plus s B'."""
    if own.w is not None:
        bias = None if update.scales else own.bias
        y: Tensor = follow(False, update.k, x, s, own.w, bias, update.b)
    else:
        y = own.call(x).to(x.dtype)
        y = torch.addmm(flat(y), s, update.b.to(x.dtype).t(), alpha=update.k).view(y.shape)
    return finished(y, update, own)


def _follow(pending: Pending, update: Update, s: Tensor, own: Own) -> Tensor:
    if not (pending.share and own.w is not None and pending.rest):
        return _onto(pending.alias, s, update, own)
    bias = None if update.scales else own.bias
    y, pending.alias = follow(True, update.k, pending.alias, s, own.w, bias, update.b)
    return finished(y, update, own)


def version(x: Tensor) -> int:
    """How often a tensor was written to, where it counts that."""
    return 0 if x.is_inference() else x._version


def _followers(
    host: LayerHost, update: Update, given: Tensor, call: Call
) -> Iterator[tuple[LayerHost, Update]]:
    """The layers that will read this input next, and their updates."""
    for one in FOLLOWERS.get(host, ()):
        other: Any = one()
        if other is None or other.switch is not host.switch or getattr(other, "site", None) is None:
            continue
        names = other.present(call.active)
        parts = other.parts(names)
        if not parts or names == other.merged_adapters or reason(other, parts):
            continue
        if any(p.skip and p.training for p in parts) or parts[0].rate() != update.rate:
            continue
        if other.site.shape[1] == given.shape[-1]:
            yield other, combined(other, parts)


def _mask(host: LayerHost, given: Tensor, x: Tensor, rate: float) -> Mask | None:
    """The mask for an input, which layers have in common that read it one after another."""
    if not rate:
        return None
    if given.is_inference():  # which counts no versions
        return Mask.draw(rate, flat(x))
    STATE.last = reading(STATE.last, given, id(host), rate, lambda: Mask.draw(rate, flat(x)))
    return STATE.last.mask


def dropped(x: Tensor, rate: float, reader: int) -> Tensor:
    """Dropout as the fast path has it, for the plain one.

    Args:
        x: the input (..., n).
        rate: the share that is dropped.
        reader: which layer reads it.
    """
    if not rate:
        return x
    if traced(x) or x.is_inference():
        return torch.nn.functional.dropout(x, rate)
    STATE.last = reading(STATE.last, x, reader, rate, lambda: Mask.draw(rate, flat(x)))
    y: Tensor = Dropped.apply(STATE.last.mask, flat(x))  # type: ignore[no-untyped-call]
    return y.view(x.shape)


def settle() -> None:
    """End a forward of a model."""
    STATE.pending = STATE.last = None
