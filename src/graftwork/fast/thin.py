"""Products with a factor of few columns, in the form that the machine computes fastest.

MKL in fp32 takes two to three times as long for (many, n) (n, 8) as for the same products the other
way round and in batches; benchmarks/thin.py shows by how much on a machine. Other dtypes and
libraries get the plain product.
"""

from __future__ import annotations

import torch
from torch import Tensor

MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
PARTS = 8  # of the rows, as one batch
RANKS = range(5, 16)  # 4 and 16 columns are MKL's own
ROWS, MANY = 256, 512
HALVES = (torch.bfloat16, torch.float16)
# whether products on a GPU can end in another dtype than their factors'
WIDE = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None


def _slow(x: Tensor) -> bool:
    return MKL and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()


def narrow(x: Tensor, m: Tensor) -> Tensor:
    """x m, (rows, r), for x (rows, n) and m (n, r)."""
    rows, r = x.shape[0], m.shape[1]
    if r in RANKS and rows >= ROWS and rows % PARTS == 0 and _slow(x):
        parts = x.view(PARTS, rows // PARTS, -1)
        return torch.bmm(m.t().expand(PARTS, r, -1), parts.mT).mT.reshape(rows, r)
    return torch.mm(x, m)


def across(s: Tensor, x: Tensor) -> Tensor:
    """s' x, (r, n), for s (rows, r) and x (rows, n)."""
    (rows, r), n = s.shape, x.shape[1]
    if r <= 32 and rows >= MANY and n >= MANY and n % 2 == 0 and _slow(x):
        halves = x.view(rows, 2, n // 2).transpose(0, 1)
        return torch.bmm(s.t().expand(2, r, rows), halves).transpose(0, 1).reshape(r, n)
    return torch.mm(s.t(), x)


def ending(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x y in a dtype; on a GPU without a kernel that converts it, and without its rounding."""
    if WIDE and x.is_cuda and dtype is torch.float32 and x.dtype in HALVES:
        return torch.mm(x, y, out_dtype=dtype)
    found = torch.mm(x, y)
    return found if found.dtype is dtype else found.to(dtype)
