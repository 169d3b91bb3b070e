"""sum_i -log softmax(W h_i + b)[t_i] over rows h (rows, width), with W (words, width), a part of
the rows at a time. Each part's logits give its share of the loss and, at once, of the gradient, and
are gone: of all the logits (rows, words), the largest tensor of a small batch's step, none stays.

torch's own ``linear_cross_entropy`` does that since 2.13. It returns the loss in h's dtype, sums it
in bf16 where h is bf16, and computes in fp32 on a CPU; so numbers of half precision go through
``Sum`` here, whose products are in their dtype and whose loss is in fp32, as of the plain path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # a label that the loss leaves out
BYTES = 2**26  # of the logits of one part
ROWS = 256  # at least, so that the weight is not read too often: 16 rows take 2.5 times the time


def rows_of(rows: int, words: int) -> int:
    """How many rows a part has: two parts at least, and parts of like size."""
    most = min(max(ROWS, BYTES // (4 * words)), -(-rows // 2))
    return max(1, -(-rows // -(-rows // max(1, most))))


class Sum(torch.autograd.Function):
    """The loss summed over the rows, in fp32, with products in the dtype of h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor | None, t: Tensor, rows: int) -> Tensor:
        """h (rows, width), w (words, width), b (words,), t (rows,)."""
        needs = ctx.needs_input_grad
        wide = torch.float32 if h.dtype == torch.float16 else h.dtype  # 1e-8 is 0 in fp16
        dh = torch.empty_like(h, dtype=wide) if needs[0] else None
        exact: Any = {"dtype": max_of(h.dtype), "device": h.device}
        dw = torch.zeros(w.shape, **exact) if needs[1] else None
        db = torch.zeros(len(w), **exact) if b is not None and needs[2] else None
        total: Tensor = torch.zeros((), **exact)
        for start in range(0, len(h), rows):
            x, to = h[start : start + rows], t[start : start + rows, None]
            y = functional.linear(x, w, b).to(total.dtype)
            norm = y.logsumexp(-1, keepdim=True)
            total += (norm - y.gather(-1, to)).sum()
            g = y.sub_(norm).exp_()  # the gradient of y: its softmax, less 1 at the target
            g.scatter_add_(-1, to, -torch.ones_like(norm))
            if db is not None:
                db += g.sum(0)
            g = g.to(h.dtype)
            if dh is not None:
                dh[start : start + rows] = g @ w
            if dw is not None:
                dw += g.mT @ x
        kinds = h.dtype, w.dtype, None if b is None else b.dtype
        ctx.kinds, ctx.has = kinds, [d is not None for d in (dh, dw, db)]
        ctx.save_for_backward(*(d for d in (dh, dw, db) if d is not None))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that the forward found, times the loss's own."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of a loss that was computed in parts has no gradient of its own; for "
                "create_graph=True, compute the loss outside of fused_loss"
            )
        saved, out = list(ctx.saved_tensors), []
        for kind, there in zip(ctx.kinds, ctx.has, strict=True):
            out.append((saved.pop(0) * upstream).to(kind) if there else None)
        return *out, None, None


def max_of(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where the numbers are."""
    return torch.promote_types(dtype, torch.float32)


def with_torch(h: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> Tensor:
    """torch's own function."""
    given: Any = functional
    options = torch.nn.LinearCrossEntropyOptions(  # type: ignore[attr-defined,unused-ignore]
        batch_chunk_size=rows_of(len(h), len(w)), chunking_method=None
    )
    loss: Tensor = given.linear_cross_entropy(
        h, w, t, linear_bias=b, reduction="sum", options=options
    )
    return loss


def with_liger(h: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> Tensor:
    """liger-kernel's function, in Triton."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, t, b)
    return loss


def with_sum(h: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> Tensor:
    """The function above."""
    function: Any = Sum
    loss: Tensor = function.apply(h, w, b, t, rows_of(len(h), len(w)))
    return loss


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]] = {
    "liger": with_liger, "torch": with_torch, "parts": with_sum,
}  # fmt: skip
TOLD = {
    "liger": "liger-kernel's linear cross entropy",
    "torch": "torch's linear_cross_entropy",
    "parts": "linear cross entropy, a part of the rows at a time",
}


@cache
def has_liger() -> bool:
    """Whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None


def kernel_for(device: torch.device, dtype: torch.dtype) -> str:
    """A key of ``KERNELS``: what computes the loss of such hidden states."""
    if device.type == "cuda" and has_liger():
        return "liger"
    own = hasattr(functional, "linear_cross_entropy") and dtype.itemsize >= 4
    return "torch" if own else "parts"


def loss_of(
    h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, count: Any = None
) -> tuple[Tensor, str]:
    """The loss of hidden states, and what computed it.

    Args:
        h: hidden states (..., width).
        w: the output layer's weight (words, width).
        b: its bias (words,), or None.
        labels: what each of the states should predict (...,); those of -100 are left out.
        count: what the sum is divided by; by default the number of labels that count.
    """
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, w, b = h.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    h, labels = h.flatten(0, -2), labels.flatten().to(h.device)
    kept = (labels != IGNORED).nonzero().squeeze(-1)
    if len(kept) < len(labels):  # the others have no part in it: prompts, padding, a row's last
        h, labels = h.index_select(0, kept), labels.index_select(0, kept)
    kernel = kernel_for(h.device, h.dtype)
    if len(kept):
        with torch.autocast(h.device.type, enabled=False):
            total = KERNELS[kernel](h, w, b, labels)
    else:
        total = h.sum().to(max_of(h.dtype))
    if isinstance(count, Tensor):
        count = count.to(total.device)
    return total / (len(kept) if count is None else count), kernel
