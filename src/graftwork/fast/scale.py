"""Gains of channels, rows' norms and block rotations, in few passes over the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .plain import watched


class Scaled(torch.autograd.Function):
    """y = g u + b over the last axis: u (..., n), g (n,), b (n,) or None."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        gain = g.to(u.dtype)
        ctx.save_for_backward(u if ctx.needs_input_grad[1] else None, g)
        return u * gain if b is None else torch.addcmul(b.to(u.dtype), u, gain)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        u, g = ctx.saved_tensors
        gain, (need_u, need_g, need_b) = g.to(gy.dtype), ctx.needs_input_grad
        du = dg = None
        rows = tuple(range(gy.ndim - 1))
        if need_g:
            product = gy * u  # a product of matrices sums its columns faster than sum does
            dg = (u.new_ones(1, gy[..., 0].numel()) @ product.reshape(-1, len(g)))[0].to(g.dtype)
            if need_u and not torch.is_grad_enabled():
                du = torch.mul(gy, gain, out=product)  # the same memory once more
        if need_u and du is None:
            du = gy * gain
        return du, dg, gy.sum(rows) if need_b else None


class Blocks(torch.autograd.Function):
    """x times a block diagonal matrix: x (rows, blocks k), r (blocks, k, k)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, r)
        return times_blocks(x, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, r = ctx.saved_tensors
        need_x, need_r = ctx.needs_input_grad
        dr = by_block(x, r).mT @ by_block(g, r) if need_r else None
        if not need_x:
            return None, dr
        if torch.is_grad_enabled():
            return Blocks.apply(g, r.mT), dr  # type: ignore[no-untyped-call]
        return times_blocks(g, r.mT), dr


def by_block(x: Tensor, r: Tensor) -> Tensor:
    """x (rows, blocks k) as (blocks, rows, k), without a copy."""
    return x.reshape(len(x), len(r), -1).transpose(0, 1)


def times_blocks(x: Tensor, r: Tensor) -> Tensor:
    """What ``Blocks`` gives, written where it belongs."""
    out = x.new_empty(len(x), len(r), r.shape[-1])
    torch.bmm(by_block(x, r), r, out=out.transpose(0, 1))
    return out.view(len(x), -1)


def scaled(x: Tensor, g: Tensor) -> Tensor:
    """x times g, in the dtype of x; g broadcasts."""
    if watched(x) or g.ndim != 1:
        return x * g.to(x.dtype)
    y: Tensor = Scaled.apply(x, g, None)  # type: ignore[no-untyped-call]
    return y


def blocks(x: Tensor, r: Tensor) -> Tensor:
    """x (..., blocks k) times the block diagonal matrix of r (blocks, k, k)."""
    if watched(x) or type(r) is not Tensor:
        rows = torch.unflatten(x, -1, (-1, r.shape[-1]))
        return torch.einsum("...nk,nkc->...nc", rows, r).flatten(-2)
    y: Tensor = Blocks.apply(x.reshape(-1, x.shape[-1]), r)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def row_norms(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """||W + B A|| by rows without the sum: w (..., out, in), a (..., r, in), b (..., out, r).

    ||w||^2 + 2 <w A', b> + <b A A', b> for each row, in fp32 or better.
    """
    dtype = torch.promote_types(w.dtype, torch.float32)
    cross = (w @ a.to(w.dtype).mT).to(dtype)
    a, b = a.to(dtype), b.to(dtype)
    own = torch.linalg.vector_norm(w, dim=-1, dtype=dtype).square()
    square = own + ((2 * cross + b @ (a @ a.mT)) * b).sum(-1)
    norms: Tensor = square.clamp(min=0).sqrt()
    return norms
