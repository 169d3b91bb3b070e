"""Starts that do not look at the base weight; B A = 0, so the update begins at zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.site import Embedding, Site


def kaiming(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0; at an embedding A = 0, B ~ N(0, 1)."""
    a, b = torch.zeros_like(adapter.A), torch.zeros_like(adapter.B)
    if isinstance(site, Embedding):
        return a, nn.init.normal_(b)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5)), b


def random(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """Both factors random: the update does not begin at zero. For tests."""
    a, b = torch.empty_like(adapter.A), torch.empty_like(adapter.B)
    if isinstance(site, Embedding):
        return nn.init.normal_(a), nn.init.normal_(b)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5)), nn.init.kaiming_uniform_(b, a=math.sqrt(5))


def gaussian(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/r^2), B = 0."""
    if isinstance(site, Embedding):
        return kaiming(adapter, site)
    a, b = torch.empty_like(adapter.A), torch.zeros_like(adapter.B)
    return nn.init.normal_(a, std=1 / adapter.r), b


def orthogonal(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """A' = N1 Q[even] / 10, B = N2 Q[odd] / 10, Q (r, r) orthogonal: both random, B A = 0."""
    r = adapter.r
    if r % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal' needs an even rank, not r={r}; try r={r + 1}"
        )
    out, in_ = site.shape
    q = torch.linalg.qr(torch.randn(*site.lead, r, r))[0]
    a = (torch.randn(*site.lead, in_, r // 2) @ q[..., 0::2, :] / 10).mT
    b = torch.randn(*site.lead, out, r // 2) @ q[..., 1::2, :] / 10
    return site.from_factors(a, b)
