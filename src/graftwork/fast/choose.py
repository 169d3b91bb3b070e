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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bits import Dropped, Mask, Reading, reading
from .linear import Work, begin, finish, flat, folded, folds, shrink
from .plain import traced, watched
from .plan import Own, Refused, Update, combined, own, rate_of
from .scale import Scaled

if TYPE_CHECKING:
    from ..engine.host import LayerHost
    from ..engine.switch import Call, Switch


@dataclass
class Pending:
    """What a leader has computed for the layers that read the same input next."""

    call: Call
    x: Tensor  # the input as the layers are given it
    version: int
    recorded: bool  # for a backward
    rest: list[tuple[LayerHost, float, Callable[..., Tensor]]]  # layer, dropout, what gives y

    def take(self, host: LayerHost) -> tuple[float, Callable[..., Tensor]] | None:
        """What there is for a layer, which is then no longer left."""
        for i, (one, rate, ready) in enumerate(self.rest):
            if one is host and self.version == version(self.x):
                if self.call is not host.switch.current():
                    return None
                if self.recorded is not torch.is_grad_enabled():
                    return None
                del self.rest[i]
                if not self.rest:
                    STATE.pending = None
                return rate, ready
        return None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.pending: Pending | None = None
        self.last: Reading | None = None  # who drops what
        self.given: weakref.ref[Tensor] | None = None  # what a layer got for a mixed batch
        self.split: Any = None  # the layer that runs such a batch in groups just now


STATE = _Thread()
FEW = 64  # rows: with fewer, sharing costs more than it saves
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
LINKING = threading.Lock()


def link(switch: Switch, hosts: Callable[[], Mapping[str, Any]]) -> None:
    """Find out which layers of a model read one input, by their names, where that is not known.

    Args:
        switch: the model's.
        hosts: gives its hosts by path.
    """
    if torch.compiler.is_compiling() or switch in LINKED:
        return
    with LINKING:
        if switch not in LINKED:
            _link(hosts())
            LINKED.add(switch)


def unlink(switch: Switch) -> None:
    """Forget which layers of a model read one input: there are others."""
    with LINKING:
        LINKED.discard(switch)


def _link(places: Mapping[str, Any]) -> None:
    for path, host in places.items():
        parent, _, name = path.rpartition(".")
        own: list[Any] = []
        for names in TOGETHER:
            least = 1 if CROSS.search(parent) and len(names) == 3 else 0
            if name in names and (i := names.index(name)) >= least:
                own = [places.get(f"{parent}.{n}" if parent else n) for n in names[i + 1 :]]
        FOLLOWERS[host] = tuple(weakref.ref(other) for other in own if other is not None)


def run(
    host: LayerHost, names: tuple[str, ...], x: Tensor, base: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The layer's output with these adapters; None where the plain path has to be taken.

    Args:
        host: where the layer stood.
        names: the adapters, all of which are here.
        x: the input, (..., in).
        base: the layer's own forward.
    """
    if watched(x) or not x.is_floating_point():
        return None
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return _run(host, names, x, None, base)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _run(host, names, x, dtype, base)


def _run(
    host: LayerHost,
    names: tuple[str, ...],
    x: Tensor,
    dtype: torch.dtype | None,
    base: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """``dtype``: that of autocast."""
    pending = STATE.pending
    if pending is not None and pending.x is x and (taken := pending.take(host)) is not None:
        _mask(host, x, x, taken[0])
        return taken[1](base)
    parts = host.parts(names)
    rate = rate_of(host, parts)
    if isinstance(rate, Refused):
        return None
    mine = own(host)
    if mine.w is None and (dtype is not None or parts[0].scales):
        return None  # the layer casts by itself; its bias is within what it gives
    if dtype is None and mine.w is not None and mine.w.dtype is not x.dtype:
        return None  # torch will say so
    cast = x if dtype is None else x.to(dtype)
    return _lead(host, combined(host, parts, rate), x, cast, mine, base)


def finished(y: Tensor, update: Update, own: Own) -> Tensor:
    """An output with what is added to the bias, or scaled."""
    if update.gain is not None:
        y = Scaled.apply(y, update.gain, own.bias)  # type: ignore[no-untyped-call]
    return y if update.shift is None else y + update.shift.to(y.dtype)


def _lead(
    host: LayerHost,
    update: Update,
    given: Tensor,
    x: Tensor,
    own: Own,
    base: Callable[[Tensor], Tensor],
) -> Tensor:
    """A layer that may be the first of several that read one input."""
    bias = own.bias if update.gain is None else None
    # in training checkpointing repeats what it has not recorded, and shall find the same bits
    idle = not (host.training or update.rate or torch.is_grad_enabled())
    if idle and own.w is not None and folds(x, own.w):
        return finished(folded(x, own.w, bias, update.k, update.b, _factor(update)), update, own)
    several = given.numel() >= FEW * given.shape[-1]
    followers = FOLLOWERS.get(host, ()) if several else ()
    call = host.switch.current()
    others = _followers(host, followers, update, given, own, call) if followers else []
    mask = _mask(host, given, x, update.rate) if update.rate else None
    if not others and own.w is not None:
        y, _ = begin(Work(mask, (update.k,)), x, (own.w,), (bias,), (update.b,), (_factor(update),))
        return finished(y, update, own)
    every = [(host, update, own), *others]
    y, ready = _shrunk(mask, every, x, base) if own.w is None else _layers(mask, every, x)
    if others:
        rest = [(one, update.rate, how) for (one, *_), how in zip(others, ready, strict=True)]
        recorded = torch.is_grad_enabled()
        STATE.pending = Pending(call, given, version(given), recorded, rest)
    return y


Member = tuple["LayerHost", Update, Own]
Ready = list[Callable[..., Tensor]]  # what gives the outputs of the others, in their order


def _layers(mask: Mask | None, every: list[Member], x: Tensor) -> tuple[Tensor, Ready]:
    """The output of the first of layers whose products are computed here."""
    work = Work(mask, [update.k for _, update, _ in every])
    w: list[Any] = [own.w for _, _, own in every]
    bias = [_bias(one) for one in every]
    b, a = [update.b for _, update, _ in every], [_factor(update) for _, update, _ in every]
    first, rooms = begin(work, x, w, bias, b, a)
    ready: Ready = [partial(_follow, work, i, x, y, every[i]) for i, y in enumerate(rooms, 1)]
    return finished(first, *every[0][1:]), ready


def _bias(member: Member) -> Tensor | None:
    """What is added before a gain would be."""
    return member[2].bias if member[1].gain is None else None


def _follow(
    work: Work,
    i: int,
    x: Tensor,
    y: Tensor | None,
    member: Member,
    _: Callable[[Tensor], Tensor],
) -> Tensor:
    """The output of another of them."""
    w: Any = member[2].w
    return finished(finish(work, i, x, y, w, _bias(member)), *member[1:])


def _shrunk(
    mask: Mask | None, every: list[Member], x: Tensor, base: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Ready]:
    """The output of the first of layers that compute their own products by themselves."""
    found = shrink(mask, x, *[_factor(update) for _, update, _ in every])
    s, *more = found if len(every) > 1 else (found,)
    ready: Ready = [
        partial(_onto, x, one, update) for one, (_, update, _) in zip(more, every[1:], strict=True)
    ]
    return _onto(x, s, every[0][1], base), ready


def _onto(x: Tensor, s: Tensor, update: Update, base: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer's own output, however it computes it, plus k s B'."""
    y = base(x).to(x.dtype)
    y = torch.addmm(flat(y), s, update.b.to(x.dtype).t(), alpha=update.k).view(y.shape)
    return finished(y, update, Own(None, None))


def _factor(update: Update) -> Tensor:
    return update.a[0] if len(update.a) == 1 else torch.cat(update.a)


def version(x: Tensor) -> int:
    """How often a tensor was written to, where it counts that."""
    return 0 if x.is_inference() else x._version


def _followers(
    host: LayerHost,
    followers: tuple[weakref.ref[LayerHost], ...],
    update: Update,
    given: Tensor,
    mine: Own,
    call: Call,
) -> list[Member]:
    """The layers that will read this input next and compute their product in the same way."""
    found: list[Member] = []
    for one in followers if call.rows is None else ():
        other: Any = one()
        if other is None or other.switch is not host.switch or getattr(other, "site", None) is None:
            continue
        names = other.present(call.active)
        if not names or names == other.merged_adapters:
            continue
        parts = other.parts(names)
        rate = rate_of(other, parts)
        if rate != update.rate or other.site.shape[1] != given.shape[-1]:
            continue
        theirs = own(other)
        alike = mine.w is not None and theirs.w is not None and mine.w.dtype is theirs.w.dtype
        if alike or (mine.w is theirs.w and not parts[0].scales):
            found.append((other, combined(other, parts, update.rate), theirs))
    return found


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
