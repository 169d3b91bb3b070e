"""A linear layer with low-rank updates: y = x W' + b + (D x) A' B', as one node of the graph.

The low-rank product is written first and the layer's own is accumulated onto it, in the same pass
as it is computed; the gradient of the input likewise. D, dropout, is a window of ``bits``. Layers
that are called one after another with the same input share what depends on it alone: the first one,
the leader, computes x A' for all, and the gradients of their inputs are accumulated into one tensor
on the way back: a follower takes the leader's input as its own output, so that autograd runs them
one after another.

Kept for the backward pass: x, once for all that share it, and x A'. Where x is a product whose
factors autograd keeps anyhow, as in a gated MLP, it is multiplied again instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bits import Mask


def flat(x: Tensor) -> Tensor:
    """x (..., n) as (rows, n)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def sources(x: Tensor) -> tuple[Tensor, ...]:
    """What to keep of x: itself, or the two tensors that it is the product of."""
    node: Any = x.grad_fn
    if node is None or node.name() != "MulBackward0" or x.numel() < 1024:
        return (x,)
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return (x,)  # a hook may compute anew what it is asked for
    p, q = node._saved_self, node._saved_other
    if any(type(t) is not Tensor or (t.shape, t.dtype) != (x.shape, x.dtype) for t in (p, q)):
        return (x,)
    return p, q


def start(s: Tensor, bt: Tensor, bias: Tensor | None) -> Tensor:
    """s (rows, r) times B' (r, out), plus a bias (out,)."""
    return torch.mm(s, bt) if bias is None else torch.addmm(bias, s, bt)


def expanded(b: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    """B' (r, out), contiguous, in the dtype of the activations; what is kept is scaled up here."""
    bt = b.t().to(dtype).contiguous()
    return bt if mask is None else bt * (1 / (1 - mask.p))


def join(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Factors (r, in) of several layers in one, in the dtype of the activations."""
    return a[0].to(dtype) if len(a) == 1 else torch.cat([one.to(dtype) for one in a])


class Leader(torch.autograd.Function):
    """The first layer, or the only one, that reads an input."""

    @staticmethod
    def forward(
        ctx: Any,
        mask: Mask | None,
        share: bool,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        b: Tensor,
        *a: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.mask, ctx.ranks = mask, [len(one) for one in a]
        x2, w2 = flat(x), w.to(x.dtype)
        all_a, bt = join(a, x.dtype), expanded(b, mask, x.dtype)
        s = (x2 if mask is None else mask.times(x2)) @ all_a.t()
        own, *others = s.split_with_sizes(ctx.ranks, 1)
        y = start(own, bt, None if bias is None else bias.to(x.dtype)).addmm_(x2, w2.t())
        keep = any(ctx.needs_input_grad[6:]) or ctx.needs_input_grad[5]
        kept = sources(x) if keep else ()
        ctx.factors = len(kept)
        ctx.save_for_backward(own, w, b, *a, *kept)
        y = y.view(*x.shape[:-1], -1)
        if len(a) == 1:
            return y
        return y, x.view_as(x) if share else None, *others

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gx: Tensor | None = None, *gs: Tensor | None) -> Any:
        s, w, b, *a = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _again(ctx, gy, gx, gs)
        kept, a = a[len(ctx.ranks) :], a[: len(ctx.ranks)]
        like = next(g for g in (gy, gx, *gs) if g is not None)
        dtype, mask = like.dtype, ctx.mask
        need_x, _, need_bias, need_b, *need_a = ctx.needs_input_grad[2:]
        all_a = join(a, dtype)
        n = like.numel() // like.shape[-1]
        db = dbias = own = g2 = None
        if gy is not None:
            g2, bt = flat(gy), expanded(b, mask, dtype)
            own = g2 @ bt.t()
            db = down(s, g2, mask).to(b.dtype) if need_b else None
            dbias = g2.sum(0) if need_bias else None
        parts = [own, *gs, *[None] * (len(a) - 1 - len(gs))]
        ds = gathered(parts, ctx.ranks, n, all_a)
        da: Sequence[Tensor | None] = [None] * len(a)
        if any(need_a):
            every = ds.t() @ dropped(kept, mask)
            da = [d.to(one.dtype) for d, one in zip(every.split_with_sizes(ctx.ranks), a, strict=True)]
        dx = None
        if need_x:
            dx = into(None if gx is None else flat(gx), ds, all_a, mask)
            if g2 is not None:
                dx.addmm_(g2, w.to(dtype))
            dx = dx.view(*like.shape[:-1], -1)
        return None, None, dx, None, dbias, db, *da


def dropped(kept: Sequence[Tensor], mask: Mask | None) -> Tensor:
    """The input (rows, in) of the low-rank product, from what was kept of it."""
    x2 = flat(kept[0] if len(kept) == 1 else kept[0] * kept[1])
    return x2 if mask is None else mask.times(x2)


def down(s: Tensor, g: Tensor, mask: Mask | None) -> Tensor:
    """The gradient of B (out, r): g' s, in the layout that reads g (rows, out) as it lies."""
    db = s.t() @ g
    return (db if mask is None else db.mul_(1 / (1 - mask.p))).t()


def gathered(parts: Sequence[Tensor | None], ranks: list[int], n: int, like: Tensor) -> Tensor:
    """The gradients of x A' of all layers, (n, all ranks); a layer that was not used has zeros."""
    found = [
        like.new_zeros(n, r) if part is None else part for part, r in zip(parts, ranks, strict=True)
    ]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def into(dx: Tensor | None, ds: Tensor, a: Tensor, mask: Mask | None) -> Tensor:
    """The gradient of the input by way of A, added to dx (rows, in) in place."""
    if dx is None:
        dx = ds @ a
        return dx if mask is None else mask.times_(dx)
    return dx.addmm_(ds, a) if mask is None else mask.add_(dx, ds @ a)


def _again(ctx: Any, gy: Any, gx: Any, gs: Any) -> Any:
    """The backward pass in plain operations, for a gradient of the gradient."""
    _, w, b, *a = ctx.saved_tensors
    kept, a = a[len(ctx.ranks) :], a[: len(ctx.ranks)]
    mask, like = ctx.mask, next(g for g in (gy, gx, *gs) if g is not None)
    need_x, _, need_bias, need_b, *need_a = ctx.needs_input_grad[2:]
    dtype, n = like.dtype, like.numel() // like.shape[-1]
    all_a = join(a, dtype)
    scale = 1.0 if mask is None else 1 / (1 - mask.p)
    own = db = dbias = None
    da: list[Tensor | None] = [None] * len(a)
    x2 = dropped(kept, mask) if kept else all_a  # which is not read then
    if gy is not None:
        g2 = flat(gy)
        own = scale * (g2 @ b.to(dtype))
        db = (scale * (g2.t() @ (x2 @ a[0].to(dtype).t()))).to(b.dtype) if need_b else None
        dbias = g2.sum(0) if need_bias else None
    ds = gathered([own, *gs, *[None] * (len(a) - 1 - len(gs))], ctx.ranks, n, all_a)
    if any(need_a):
        every = (ds.t() @ x2).split_with_sizes(ctx.ranks)
        da = [d.to(one.dtype) for d, one in zip(every, a, strict=True)]
    dx = None
    if need_x:
        low = ds @ all_a
        dx = low if mask is None else mask.times(low)
        dx = dx if gy is None else dx + flat(gy) @ w.to(dtype)
        dx = dx.view(*like.shape[:-1], -1)
        dx = dx if gx is None else dx + gx
    return None, None, dx, None, dbias, db, *da


class Follower(torch.autograd.Function):
    """A layer that reads the input of a leader: gives its output, and that input for the next."""

    @staticmethod
    def forward(
        ctx: Any,
        mask: Mask | None,
        share: bool,
        x: Tensor,
        s: Tensor,
        w: Tensor,
        bias: Tensor | None,
        b: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.mask = mask
        x2, bt = flat(x), expanded(b, mask, x.dtype)
        y = start(s, bt, None if bias is None else bias.to(x.dtype))
        y.addmm_(x2, w.to(x.dtype).t())
        ctx.save_for_backward(s, w, b)
        y = y.view(*x.shape[:-1], -1)
        return (y, x.view_as(x)) if share else y

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gx: Tensor | None = None) -> Any:
        s, w, b = ctx.saved_tensors
        _, _, need_x, need_s, _, need_bias, need_b = ctx.needs_input_grad
        if gy is None:
            return None, None, gx, None, None, None, None
        g2, mask, twice = flat(gy), ctx.mask, torch.is_grad_enabled()
        ds = db = dx = None
        if twice:
            scale = 1.0 if mask is None else 1 / (1 - mask.p)
            ds = scale * (g2 @ b.to(gy.dtype))
            db = (scale * (g2.t() @ s)).to(b.dtype)
            dx = flat(gy) @ w.to(gy.dtype) if need_x else None
            dx = dx if dx is None or gx is None else dx + flat(gx)
        else:
            ds = g2 @ expanded(b, mask, gy.dtype).t() if need_s else None
            db = down(s, g2, mask).to(b.dtype) if need_b else None
            if need_x:
                w2 = w.to(gy.dtype)
                dx = g2 @ w2 if gx is None else flat(gx).addmm_(g2, w2)
        dx = None if dx is None else dx.view(*gy.shape[:-1], -1)
        return None, None, dx, ds, None, g2.sum(0) if need_bias else None, db


class Shrink(torch.autograd.Function):
    """x A' for layers that compute their own product by themselves, such as quantised ones."""

    @staticmethod
    def forward(ctx: Any, mask: Mask | None, x: Tensor, *a: Tensor) -> Any:
        ctx.mask, ctx.ranks, ctx.shape = mask, [len(one) for one in a], x.shape
        x2 = flat(x)
        s = (x2 if mask is None else mask.times(x2)) @ join(a, x.dtype).t()
        kept = sources(x) if any(ctx.needs_input_grad[2:]) else ()
        ctx.save_for_backward(*a, *kept)
        return s if len(a) == 1 else s.split_with_sizes(ctx.ranks, 1)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        a = ctx.saved_tensors
        kept, a = a[len(ctx.ranks) :], a[: len(ctx.ranks)]
        ds = gs[0] if len(gs) == 1 else torch.cat(gs, 1)
        mask, all_a = ctx.mask, join(a, ds.dtype)
        da: Sequence[Tensor | None] = [None] * len(a)
        if kept:
            every = ds.t() @ dropped(kept, mask)
            da = [d.to(one.dtype) for d, one in zip(every.split_with_sizes(ctx.ranks), a, strict=True)]
        dx = None
        if ctx.needs_input_grad[1]:
            dx = ds @ all_a
            dx = (dx if mask is None else mask.times(dx)).view(ctx.shape)
        return None, dx, *da


def product(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """The layer with its update where nothing is recorded."""
    x2 = flat(x)
    bias = None if bias is None else bias.to(x.dtype)
    y = start(x2 @ a.to(x.dtype).t(), b.t().to(x.dtype), bias).addmm_(x2, w.to(x.dtype).t())
    return y.view(*x.shape[:-1], -1)
