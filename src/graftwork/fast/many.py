"""A linear layer with the adapters of a mixed batch that learn, as one node of the graph.

For the rows of each adapter y = x W' + b + k (x A') B', as in ``linear``. All adapters have as many
rows, which lie next to each other, and factors of one shape, which lie in one tensor: so a product
with the factors of all is one batched product, and that with the weight is accumulated onto it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear import applied, dropped, flat, like, shaped, sources


class Many(torch.autograd.Function):
    """``apply(x, w, bias, b, a, k)``, see ``many``. Products are written with the short side first,
    which is the faster way.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, a: Tensor, k: float
    ) -> Any:
        x2, down, up = flat(x), like(a, x.dtype), like(b, x.dtype)
        (rows, in_), out, n = x2.shape, w.shape[0], a.shape[0]
        h = torch.bmm(down, x2.view(n, -1, in_).mT)  # (adapters, r, rows of each)
        y = x2.new_empty(rows, out)
        each = y.view(n, -1, out)
        if bias is None:
            each.baddbmm_(h.mT, up, beta=0, alpha=k)
        else:
            y.copy_(bias)
            each.baddbmm_(h.mT, up, alpha=k)
        y.addmm_(x2, like(w, x.dtype).t())
        ctx.k = k
        ctx.save_for_backward(h, w, b, a, *sources(x))
        return shaped(y, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        h, w, b, a, *kept = ctx.saved_tensors
        x, g2, k, n = dropped(kept, None), flat(g), ctx.k, a.shape[0]
        need_x, _, need_bias, need_b, need_a, _ = ctx.needs_input_grad
        again = torch.is_grad_enabled()  # for a gradient of the gradient
        down, up = like(a, g.dtype), like(b, g.dtype)
        x3, g3 = x.view(n, -1, x.shape[1]), g2.view(n, -1, g2.shape[1])
        gh = times(up, g3.mT, k)
        h = torch.bmm(down, x3.mT) if again else h
        db = like(times(h, g3, k), b.dtype) if need_b else None
        da = like(torch.bmm(gh, x3), a.dtype) if need_a else None
        dx = None
        if need_x:
            dx = torch.bmm(gh.mT, down).view(x.shape)
            add = torch.addmm if again else Tensor.addmm_
            dx = shaped(add(dx, g2, like(w, dx.dtype)), g)
        return dx, None, g2.sum(0) if need_bias else None, db, da, None


def times(a: Tensor, b: Tensor, k: float) -> Tensor:
    """k a b, batched."""
    if k == 1:
        return torch.bmm(a, b)
    if torch.is_grad_enabled():
        return torch.bmm(a, b) * k
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=k)


_apply = applied(Many)


def many(x: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, a: Tensor, k: float) -> Tensor:
    """x W' + bias + k (x A') B'.

    Args:
        x: (..., in), the rows of the adapters one after another, as many of each.
        w: W (out, in).
        bias: (out,) or None.
        b: B' of each adapter, (adapters, r, out).
        a: A of each adapter, (adapters, r, in).
        k: of all adapters.
    """
    found: Tensor = _apply(x, w, bias, b, a, k)
    return found
