"""A linear layer with low-rank updates: y = x W' + b + k (D x) A' B', as one node of the graph.

The low-rank product is written first and the layer's own is accumulated onto it, in the same pass
as it is computed; the gradient of the input likewise. D, dropout, is a window of ``bits``. Layers
that are called one after another with the same input share what depends on it alone: the first one,
the leader, computes x A' for all, and the gradients of their inputs are accumulated into one tensor
on the way back: a follower takes the leader's input as its own output, so that autograd runs them
one after another.

Kept for the backward pass: x, once for all that share it, and x A'. Where x is a product whose
factors autograd keeps anyhow, as in a gated MLP, it is multiplied again instead. A and B may be in
another dtype than the activations, as their master copies are; their gradients come in theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bits import Mask
from .thin import across, narrow


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


def output(x: Tensor, s: Tensor, k: float, w: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    """x W' + bias + k s B' for x (rows, in), s (rows, r), W (out, in), bias (out,), B (out, r)."""
    ks = s if k == 1 else s * k
    low = torch.mm(ks, b.t()) if bias is None else torch.addmm(like(bias, ks.dtype), ks, b.t())
    return low.addmm_(x, w.t())


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """y (rows, n) as (..., n), by the shape of x (..., m)."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; nothing is called where it has that already."""
    return x if x.dtype is dtype else x.to(dtype)


def join(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Factors (r, in) of several layers in one, in the dtype of the activations."""
    if len(a) == 1:
        return like(a[0], dtype)
    if all(one.dtype is dtype for one in a):
        return torch.cat(tuple(a))
    rows = sum(one.shape[0] for one in a)
    return torch.cat(tuple(a), out=a[0].new_empty(rows, a[0].shape[1], dtype=dtype))


def led(
    mask: Mask | None,
    k: float,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    b: Tensor,
    a: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor], Tensor, Tensor]:
    """y, x A' of each layer, all A as one, and B, the latter two in the dtype of x."""
    x2, all_a, b2 = flat(x), join(a, x.dtype), like(b, x.dtype)
    s = narrow(x2 if mask is None else mask.times(x2), all_a.t())
    every = s.split_with_sizes([one.shape[0] for one in a], 1) if len(a) > 1 else (s,)
    return shaped(output(x2, every[0], k, like(w, x.dtype), bias, b2), x), every, all_a, b2


def lower(kept: Sequence[Tensor], mask: Mask | None, ds: Tensor, a: Sequence[Tensor]) -> Any:
    """The gradients of the factors A (r, in), from those of x A'."""
    every = like(across(ds, dropped(kept, mask)), a[0].dtype)
    return every.split_with_sizes([one.shape[0] for one in a]) if len(a) > 1 else (every,)


def upper(s: Tensor, g: Tensor, k: float, b: Tensor) -> Tensor:
    """The gradient k g' s of B (out, r), in the layout that reads g (rows, out) as it lies."""
    db = across(s, g).t()
    return like(db if k == 1 else db * k, b.dtype)


def into(dx: Tensor | None, ds: Tensor, a: Tensor, mask: Mask | None) -> Tensor:
    """The gradient of the input by way of A, added to dx (rows, in) in place."""
    if dx is None:
        dx = ds @ a
        return dx if mask is None else mask.times_(dx)
    return dx.addmm_(ds, a) if mask is None else mask.add_(dx, ds @ a)


def gathered(parts: Sequence[Tensor | None], ranks: list[int], n: int, like: Tensor) -> Tensor:
    """The gradients of x A' of all layers, (n, all ranks); a layer that was not used has zeros."""
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    filled = [
        like.new_zeros(n, r) if part is None else part for part, r in zip(parts, ranks, strict=True)
    ]
    return torch.cat(filled, 1)


class Leader(torch.autograd.Function):
    """The first layer, or the only one, that reads an input.

    ``apply(mask, share, k, x, w, bias, b, *a)``: ``share``, whether the next layers take the input
    from this one; ``a``, the factors A (r, in) of all of them. It gives y, and where there are
    several A, the input and x A' for the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mask: Mask | None,
        share: bool,
        k: float,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        b: Tensor,
        *a: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.mask, ctx.k, ctx.ranks = mask, k, [one.shape[0] for one in a]
        y, (own, *others), all_a, b2 = led(mask, k, x, w, bias, b, a)
        kept = sources(x) if any(ctx.needs_input_grad[6:]) else ()
        ctx.save_for_backward(own, w, b, all_a, b2, *a, *kept)
        if len(a) == 1:
            return y
        return y, x.view_as(x) if share else None, *others

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gx: Tensor | None = None, *gs: Tensor | None) -> Any:
        if gy is None and gx is None and not any(g is not None for g in gs):
            return (None,) * (7 + len(ctx.ranks))
        if torch.is_grad_enabled():
            return _again(ctx, gy, gx, gs)
        s, w, b, all_a, b2, *rest = ctx.saved_tensors
        a, kept = rest[: len(ctx.ranks)], rest[len(ctx.ranks) :]
        need_x, _, need_bias, need_b, *need_a = ctx.needs_input_grad[3:]
        some = next(g for g in (gy, gx, *gs) if g is not None)
        db = dbias = own = g2 = dx = None
        if gy is not None:
            g2 = flat(gy)
            own = narrow(g2, b2) if ctx.k == 1 else narrow(g2, b2).mul_(ctx.k)
            db = upper(s, g2, ctx.k, b) if need_b else None
            dbias = g2.sum(0) if need_bias else None
        parts = [own, *gs, *[None] * (len(a) - 1 - len(gs))]
        ds = gathered(parts, ctx.ranks, len(s), all_a)
        da = lower(kept, ctx.mask, ds, a) if any(need_a) else (None,) * len(a)
        if need_x:
            dx = into(None if gx is None else flat(gx), ds, all_a, ctx.mask)
            if g2 is not None:
                dx.addmm_(g2, like(w, dx.dtype))
            dx = dx.view(*some.shape[:-1], -1)
        return None, None, None, dx, None, dbias, db, *da


def _again(ctx: Any, gy: Any, gx: Any, gs: Any) -> Any:
    """A leader's backward pass in plain operations, for a gradient of the gradient."""
    s, w, b, _, _, *rest = ctx.saved_tensors
    a, kept = rest[: len(ctx.ranks)], rest[len(ctx.ranks) :]
    some = next(g for g in (gy, gx, *gs) if g is not None)
    need_x, _, need_bias, need_b, *need_a = ctx.needs_input_grad[3:]
    dtype, mask = some.dtype, ctx.mask
    x2 = dropped(kept, mask) if kept else s
    own = db = dbias = dx = None
    if gy is not None:
        g2 = flat(gy)
        own = ctx.k * (g2 @ b.to(dtype))
        db = (ctx.k * (g2.t() @ (x2 @ a[0].to(dtype).t()))).to(b.dtype) if need_b else None
        dbias = g2.sum(0) if need_bias else None
    all_a = torch.cat([one.to(dtype) for one in a])
    parts = [own, *gs, *[None] * (len(a) - 1 - len(gs))]
    ds = gathered(parts, ctx.ranks, len(s), all_a)
    da: list[Tensor | None] = [None] * len(a)
    if any(need_a):
        every = (ds.t() @ x2).split_with_sizes(ctx.ranks)
        da = [d.to(one.dtype) for d, one in zip(every, a, strict=True)]
    if need_x:
        low = ds @ all_a
        dx = low if mask is None else mask.times(low)
        dx = dx if gy is None else dx + flat(gy) @ w.to(dtype)
        dx = dx.view(*some.shape[:-1], -1)
        dx = dx if gx is None else dx + gx
    return None, None, None, dx, None, dbias, db, *da


class Follower(torch.autograd.Function):
    """A layer whose x A' is known: ``apply(share, k, x, s, w, bias, b)``.

    It gives y, and where it is to ``share``, the input for the next layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        share: bool,
        k: float,
        x: Tensor,
        s: Tensor,
        w: Tensor,
        bias: Tensor | None,
        b: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.k, b2, w2 = k, like(b, x.dtype), like(w, x.dtype)
        y = shaped(output(flat(x), s, k, w2, bias, b2), x)
        ctx.save_for_backward(s, w, b, b2)
        return (y, x.view_as(x)) if share else y

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gx: Tensor | None = None) -> Any:
        s, w, b, b2 = ctx.saved_tensors
        _, _, need_x, need_s, _, need_bias, need_b = ctx.needs_input_grad
        if gy is None:
            return None, None, gx, None, None, None, None
        g2, w2 = flat(gy), like(w, gy.dtype)
        ds = db = dx = None
        if torch.is_grad_enabled():  # for a gradient of the gradient
            ds = ctx.k * (g2 @ b.to(gy.dtype))
            db = (ctx.k * (g2.t() @ s)).to(b.dtype)
            dx = g2 @ w2 if need_x else None
            dx = dx if dx is None or gx is None else dx + flat(gx)
        else:
            if need_s:
                ds = narrow(g2, b2) if ctx.k == 1 else narrow(g2, b2).mul_(ctx.k)
            db = upper(s, g2, ctx.k, b) if need_b else None
            if need_x:
                dx = g2 @ w2 if gx is None else flat(gx).addmm_(g2, w2)
        dx = None if dx is None else dx.view(*gy.shape[:-1], -1)
        return None, None, dx, ds, None, g2.sum(0) if need_bias else None, db


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


_lead, _follow, shrink = applied(Leader), applied(Follower), applied(Shrink)


def lead(
    mask: Mask | None,
    share: bool,
    k: float,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    b: Tensor,
    *a: Tensor,
) -> Any:
    """``Leader``; where nothing is recorded, its forward without a node."""
    if torch.is_grad_enabled():
        return _lead(mask, share, k, x, w, bias, b, *a)
    y, (_, *others), *_ = led(mask, k, x, w, bias, b, a)
    return y if len(a) == 1 else (y, None, *others)


def follow(
    share: bool, k: float, x: Tensor, s: Tensor, w: Tensor, bias: Tensor | None, b: Tensor
) -> Any:
    """``Follower``; where nothing is recorded, its forward without a node."""
    if torch.is_grad_enabled():
        return _follow(share, k, x, s, w, bias, b)
    dtype = x.dtype
    y = shaped(output(flat(x), s, k, like(w, dtype), bias, like(b, dtype)), x)
    return (y, x) if share else y
