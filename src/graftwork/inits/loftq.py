"""LoftQ (arXiv 2310.08659): W ~ Q + s B A, Q quantised: Q = quantise(W - s B A), then s B A = the
leading r directions of W - Q, in turns.

The base weight stays W, so what PEFT does to it is part of the adapter: W - (W - Q) + s B A. What
is taken away has full rank, and costs as much as another weight. To save memory, quantise the base
model, and let ``replace_lora_weights_loftq`` start the adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.site import Site
from .options import LoftQConfig
from .svd import fits, halves

# quantiles of N(0, 1), scaled to [-1, 1]: the 4-bit code of QLoRA (arXiv 2305.14314, appendix E)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # entries that share a scale


def nf4(w: Tensor) -> Tensor:
    """The nearest values that NF4 has for w, in blocks of 64 scaled by their largest entry."""
    code = torch.tensor(NF4, device=w.device)
    flat = nn.functional.pad(w.flatten(), (0, -w.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True)
    middles = (code[1:] + code[:-1]) / 2
    near = torch.bucketize(flat / scale.clamp(min=1e-30), middles)
    return (code[near] * scale).flatten()[: w.numel()].view_as(w)


def int8(w: Tensor) -> Tensor:
    """The nearest values that int8 has for w, in rows scaled by their largest entry."""
    scale = w.flatten(1).abs().amax(1).clamp(min=1e-30).view(-1, *[1] * (w.ndim - 1)) / 127
    return (w / scale).round() * scale


QUANTISERS = {4: nf4, 8: int8}


def factors(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """A and B, s B A being what quantising loses."""
    _, a, b = _alternate(adapter, site)
    root = adapter.scale**0.5
    return site.from_factors(a / root, b / root)


def taken(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """s B0 A0 = W - Q, one of the two being the identity."""
    q, _, _ = _alternate(adapter, site)
    lost, (out, in_) = (site.weight.float() - q) / adapter.scale, site.shape
    eye = torch.eye(min(out, in_)).expand(*site.lead, -1, -1)
    return site.from_factors(*((eye, lost) if in_ <= out else (lost, eye)))


def _alternate(adapter: Any, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Q (..., out, in), A (..., r, in) and B (..., out, r): Q + B A is near W."""
    wishes = LoftQConfig.of(adapter.loftq_config)
    w, quantise = site.weight.float(), QUANTISERS[wishes.loftq_bits]
    rest = w
    for _ in range(wishes.loftq_iter):
        q = site.to_matrix(quantise(site.from_matrix(rest)))
        a, b = leading(w - q, adapter.r, site)
        rest = w - b @ a
    return q, a, b


def leading(w: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
    """A (..., r, in) and B (..., out, r): the r leading directions of w (..., out, in)."""
    fits(r, site)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return halves(u, s, vh, r)
