"""A linear layer with low-rank updates: y = x W' + b + k (D x) A' B', as one node of the graph.

The low-rank product is written first and the layer's own is accumulated onto it, in the same pass
as it is computed; the gradient of the input likewise. D, dropout, is a window of ``bits``. Layers
that are called one after another with the same input are one node: the first of them computes x A'
for all, and the gradients of their inputs are accumulated into one tensor on the way back. What the
others give is empty until they are called.

Kept for the backward pass: x, once for all that share it, and x A'. Where x is a product whose
factors autograd keeps anyhow, as in a gated MLP, it is multiplied again instead. A and B may be in
another dtype than the activations, as their master copies are; their gradients come in theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import Mask
from .thin import across, ending, narrow

EXACT = (torch.float32, torch.float64)


def flat(x: Tensor) -> Tensor:
    """x (..., n) as (rows, n)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def sources(x: Tensor) -> tuple[Tensor, ...]:
    """What to keep of x: itself, or the two tensors that it is the product of."""
    node: Any = x.grad_fn
    if node is None or node.name() != "MulBackward0":
        return (x,)
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return (x,)  # a hook may compute anew what it is asked for
    p, q = node._saved_self, node._saved_other
    if any(type(t) is not Tensor or (t.shape, t.dtype) != (x.shape, x.dtype) for t in (p, q)):
        return (x,)
    return p, q


def dropped(kept: Sequence[Tensor], mask: Mask | None) -> Tensor:
    """The input (rows, in) of the low-rank product, from what was kept of it."""
    x2 = flat(kept[0] if len(kept) == 1 else kept[0] * kept[1])
    return x2 if mask is None else mask.times(x2)


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; nothing is called where it has that already."""
    return x if x.dtype is dtype else x.to(dtype)


def join(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Factors (r, in) of several layers in one, in the dtype of the activations."""
    if len(a) == 1:
        return like(a[0], dtype)
    if a[0].is_cuda or all(one.dtype is dtype for one in a):
        return like(torch.cat(tuple(a)), dtype)
    rows = sum(one.shape[0] for one in a)
    return torch.cat(tuple(a), out=a[0].new_empty(rows, a[0].shape[1], dtype=dtype))


def turned(b: Tensor, k: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """B' (r, out) in a dtype, and what it is still to be multiplied by: what has to be copied comes
    with k, and with long rows, which multiply faster.
    """
    up = b.t()
    if up.dtype is dtype:
        return up, k
    made = torch.empty(up.shape, dtype=dtype, device=up.device)
    return (made.copy_(up) if k == 1 else torch.mul(up, k, out=made)), 1.0


def split(x: Tensor, ranks: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """x by layers."""
    return x.split_with_sizes(ranks, dim) if len(ranks) > 1 else (x,)


def lower(kept: Sequence[Tensor], mask: Mask | None, ds: Tensor, a: Sequence[Tensor]) -> Any:
    """The gradients of the factors A (r, in), from those of x A'."""
    x, dtype = dropped(kept, mask), a[0].dtype
    every = ending(ds.t(), x, dtype) if x.is_cuda else like(across(ds, x), dtype)
    return split(every, [one.shape[0] for one in a])


def upper(s: Tensor, g: Tensor, k: float, b: Tensor) -> Tensor:
    """The gradient k g' s of B (out, r), from g (rows, out) and s (rows, r)."""
    if g.is_cuda:  # whose products take any layout
        db = ending(g.t(), s, b.dtype)
        return db if k == 1 else db.mul_(k)
    db = across(s, g)  # the layout that reads g as it lies
    db = (db if k == 1 else db.mul_(k)).t()
    return db if b.dtype is db.dtype else torch.empty_like(b).copy_(db)


def gathered(parts: Sequence[Tensor | None], ranks: list[int], n: int, like: Tensor) -> Tensor:
    """The gradients of x A' of all layers, (n, all ranks); a layer that was not used has zeros."""
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    filled = [
        like.new_zeros(n, r) if part is None else part for part, r in zip(parts, ranks, strict=True)
    ]
    return torch.cat(filled, 1)


class Work:
    """What the products of layers that read one input, or of a single one, have in common.

    Args:
        mask: of dropout.
        k: of each layer.
    """

    __slots__ = ("apart", "k", "mask", "recorded", "s", "up", "x")

    def __init__(self, mask: Mask | None, k: Sequence[float]) -> None:
        self.mask, self.k, self.recorded = mask, k, torch.is_grad_enabled()
        self.x: Tensor  # (rows, in)
        self.s: Sequence[Tensor]  # x A' of each layer, (rows, r)
        self.up: Sequence[Tensor]  # B' of each layer, (r, out)
        self.apart: Sequence[float]  # what is left of each k

    def begin(self, x: Tensor, b: Sequence[Tensor], a: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute what all need; gives x A' and A of all as one, in the dtype of x (..., in)."""
        x2, dtype, mask = flat(x), x.dtype, self.mask
        if len(a) == 1:
            all_a, (up, apart) = like(a[0], dtype), turned(b[0], self.k[0], dtype)
            s = narrow(x2 if mask is None else mask.times(x2), all_a.t())
            self.x, self.s, self.up, self.apart = x2, (s,), (up,), (apart,)
            return s, all_a
        all_a = join(a, dtype)
        s = narrow(x2 if mask is None else mask.times(x2), all_a.t())
        self.s = s.split_with_sizes([one.shape[0] for one in a], 1)
        # those that are filled when their turn comes record nothing then
        self.x = x2.detach()
        every = [turned(one.detach(), k, dtype) for one, k in zip(b, self.k, strict=True)]
        self.up, self.apart = zip(*every, strict=True)
        return s, all_a

    def output(self, i: int, w: Tensor, bias: Tensor | None, y: Tensor | None = None) -> Tensor:
        """x W' + bias + k s B' of a layer, (rows, out), written to y; W (out, in), bias (out,)."""
        x, ks, k = self.x, self.s[i], self.apart[i]
        if k != 1:
            ks = ks * k
        if bias is None:
            low = torch.mm(ks, self.up[i], out=y)
        else:
            low = torch.addmm(like(bias.detach(), x.dtype), ks, self.up[i], out=y)
        return low.addmm_(x, like(w, x.dtype).t())


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (rows, n) as (..., n), by the shape of x (..., m)."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


class Layers(torch.autograd.Function):
    """Layers that read one input, or a single one: ``apply(work, x, *w, *bias, *b, *a)``.

    It gives an output for each; where there are several, the first one is filled, and the others
    by ``finish`` when their layers are called.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, x: Tensor, *given: Any) -> Any:
        ctx.set_materialize_grads(False)
        n = len(work.k)
        w, bias, b, a = given[:n], given[n : 2 * n], given[2 * n : 3 * n], given[3 * n :]
        s, all_a = work.begin(x, b, a)
        ctx.mask, ctx.k, ctx.ranks = work.mask, work.k, [one.shape[0] for one in a]
        ctx.apart = work.apart
        kept = sources(x) if True in ctx.needs_input_grad[2 + 2 * n :] else ()
        made = () if all([one.dtype is x.dtype for one in b]) else work.up
        ctx.made = len(made)
        ctx.save_for_backward(s, all_a, *w, *b, *a, *made, *kept)
        if n == 1:
            return shaped(work.output(0, w[0], bias[0]), x)
        rooms = tuple([x.new_empty(*x.shape[:-1], one.shape[0]) for one in w])
        work.output(0, w[0], bias[0], flat(rooms[0]))
        return rooms

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> Any:
        n, some = len(gs), next((g for g in gs if g is not None), None)
        if some is None:
            return (None,) * (2 + 4 * n)
        s, all_a, *rest = ctx.saved_tensors
        w, b, a, rest = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        made, kept = rest[: ctx.made], rest[ctx.made :]
        if torch.is_grad_enabled():
            return _again(ctx, gs, w, b, a, kept)
        needs, apart, each = ctx.needs_input_grad, ctx.apart, split(s, ctx.ranks, 1)
        ds: list[Tensor | None] = []
        dbias: list[Tensor | None] = []
        db: list[Tensor | None] = []
        flats = [g if g is None else flat(g) for g in gs]
        for i, g2 in enumerate(flats):
            if g2 is None:
                ds, dbias, db = [*ds, None], [*dbias, None], [*db, None]
                continue
            d = narrow(g2, made[i].t() if made else b[i])
            ds.append(d if apart[i] == 1 else d.mul_(apart[i]))
            dbias.append(g2.sum(0) if needs[2 + n + i] else None)
            db.append(upper(each[i], g2, ctx.k[i], b[i]) if needs[2 + 2 * n + i] else None)
        every = gathered(ds, ctx.ranks, len(s), all_a)
        da = lower(kept, ctx.mask, every, a) if True in needs[2 + 3 * n :] else [None] * n
        dx = None
        if needs[1]:
            dx = every @ all_a
            if ctx.mask is not None:
                ctx.mask.times_(dx)
            for g2, one in zip(flats, w, strict=True):
                if g2 is not None:
                    dx.addmm_(g2, like(one, dx.dtype))
            dx = shaped(dx, some)
        if None in ds:  # a layer that was not used has no gradient
            da = [one if d is not None else None for one, d in zip(da, ds, strict=True)]
        return None, dx, *[None] * n, *dbias, *db, *da


def _again(ctx: Any, gs: Any, w: Any, b: Any, a: Any, kept: Any) -> Any:
    """A backward pass in plain operations, for a gradient of the gradient."""
    n, mask, some = len(gs), ctx.mask, next(g for g in gs if g is not None)
    _, need_x, *needs = ctx.needs_input_grad
    dtype, x2 = some.dtype, dropped(kept, mask) if kept else some  # which nothing asks for then
    found: list[Tensor | None] = [None] * (4 * n)
    ds: list[Tensor | None] = [None] * n
    flats = [None if g is None else flat(g) for g in gs]
    for i, g2 in enumerate(flats):
        if g2 is None:
            continue
        ds[i] = ctx.k[i] * (g2 @ b[i].to(dtype))
        if needs[n + i]:
            found[n + i] = g2.sum(0)
        if needs[2 * n + i]:
            s = x2 @ a[i].to(dtype).t()
            found[2 * n + i] = (ctx.k[i] * (g2.t() @ s)).to(b[i].dtype)
    all_a = torch.cat([one.to(dtype) for one in a])
    every = gathered(ds, ctx.ranks, len(flat(some)), all_a)
    if any(needs[3 * n :]):
        parts = (every.t() @ x2).split_with_sizes(ctx.ranks)
        for i, (d, one) in enumerate(zip(parts, a, strict=True)):
            found[3 * n + i] = None if ds[i] is None else d.to(one.dtype)
    dx = None
    if need_x:
        dx = every @ all_a
        dx = dx if mask is None else mask.times(dx)
        for g2, one in zip(flats, w, strict=True):
            dx = dx if g2 is None else dx + g2 @ one.to(dtype)
        dx = shaped(dx, some)
    return None, dx, *found


class Shrink(torch.autograd.Function):
    """x A' for layers that compute their own product by themselves, such as quantised ones:
    ``apply(mask, x, *a)``."""

    @staticmethod
    def forward(ctx: Any, mask: Mask | None, x: Tensor, *a: Tensor) -> Any:
        ctx.mask, ctx.ranks, ctx.shape = mask, [one.shape[0] for one in a], x.shape
        x2, all_a = flat(x), join(a, x.dtype)
        s = narrow(x2 if mask is None else mask.times(x2), all_a.t())
        kept = sources(x) if any(ctx.needs_input_grad[2:]) else ()
        ctx.save_for_backward(*a, *kept)
        return s if len(a) == 1 else s.split_with_sizes(ctx.ranks, 1)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        rest = ctx.saved_tensors
        a, kept = rest[: len(ctx.ranks)], rest[len(ctx.ranks) :]
        ds = gs[0] if len(gs) == 1 else torch.cat(gs, 1)  # autograd gives zeros for none
        all_a = torch.cat([one.to(ds.dtype) for one in a])
        da = lower(kept, ctx.mask, ds, a) if kept else (None,) * len(a)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = ds @ all_a
            dx = (dx if ctx.mask is None else ctx.mask.times(dx)).view(ctx.shape)
        return None, dx, *da


def applied(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without its look for transforms, which ``plain.traced`` has had."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_record, shrink = applied(Layers), applied(Shrink)


def begin(
    work: Work,
    x: Tensor,
    w: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    b: Sequence[Tensor],
    a: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The output of the first layer, and room for those of the others where something is recorded.

    Args:
        work: of these layers.
        x: their input (..., in).
        w: W (out, in) of each.
        bias: (out,) of each.
        b: B (out, r) of each.
        a: A (r, in) of each.
    """
    if work.recorded:
        found = _record(work, x, *w, *bias, *b, *a)
        return (found, ()) if len(w) == 1 else (found[0], found[1:])
    work.begin(x, b, a)
    return shaped(work.output(0, w[0], bias[0]), x), [None] * (len(w) - 1)


def folds(x: Tensor, w: Tensor) -> bool:
    """Whether adding B A to the weight (out, in) costs less than multiplying by both, for an input
    (..., in) of which nothing is recorded. The sum is then no larger than the mean of input and
    output. In 16 bits it would round small updates away.
    """
    out, in_ = w.shape
    return x.dtype in EXACT and x.numel() * (out + in_) >= 2 * out * in_ * in_


def folded(x: Tensor, w: Tensor, bias: Tensor | None, k: float, b: Tensor, a: Tensor) -> Tensor:
    """x (W + k B A)' + bias."""
    dtype = x.dtype
    total = torch.addmm(like(w, dtype), like(b, dtype), like(a, dtype), alpha=k)
    return F.linear(x, total, bias if bias is None else like(bias, dtype))


def finish(
    work: Work, i: int, x: Tensor, y: Tensor | None, w: Tensor, bias: Tensor | None
) -> Tensor:
    """The output of another layer of ``begin``, into the room that there is for it."""
    if y is None:
        return shaped(work.output(i, w, bias), x)
    work.output(i, w, bias, flat(y.data))  # nobody has seen it yet
    return y
