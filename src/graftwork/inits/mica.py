"""MiCA (arXiv 2604.01694): W = U S V'; B = U[:, -r:], A = 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.site import Site
from .svd import _fits


def mica(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """The directions that the weight itself uses least."""
    _fits(adapter, site)
    w = site.weight
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    b = torch.linalg.svd(w, full_matrices=False)[0][..., -adapter.r :]
    return site.from_factors(b.new_zeros(*site.lead, adapter.r, site.shape[1]), b)
