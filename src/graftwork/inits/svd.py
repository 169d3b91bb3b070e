"""Starts from the base weight's own directions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.site import Site
from .drawn import seeded


def pissa(adapter: Any, site: Site, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """PiSSA (arXiv 2404.02948): W = U S V'; A = sqrt(S_r / s) V_r', B = U_r sqrt(S_r / s)."""
    fits(adapter.r, site, weight=True)
    w = site.weight.to(torch.float32)
    if rounds is None:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        with seeded(0, site.raw.device):  # a file's reader must find the same factors again
            u, s, v = torch.svd_lowrank(w, q=adapter.r, niter=rounds)
        vh = v.mT
    return site.from_factors(*halves(u, s / adapter.scale, vh, adapter.r))


def fast_pissa(name: str) -> partial[tuple[Tensor, Tensor]]:
    """``pissa_niter_N``: the same by N rounds of randomised iteration, from one seed."""
    rounds = name.removeprefix("pissa_niter_")
    if not rounds.isdigit():
        raise ValueError(
            f"init_lora_weights={name!r} needs a number of iterations, such as 'pissa_niter_4'"
        )
    return partial(pissa, rounds=int(rounds))


def olora(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """OLoRA (arXiv 2406.01775): W = Q R; B = Q[:, :r], A = R[:r]."""
    fits(adapter.r, site, weight=True)
    q, r = torch.linalg.qr(site.weight.to(torch.float32))
    return site.from_factors(r[..., : adapter.r, :], q[..., : adapter.r])


def mica(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """MiCA (arXiv 2604.01694): W = U S V'; B = U[:, -r:], which the weight uses least, A = 0."""
    fits(adapter.r, site, weight=True)
    w = site.weight.to(torch.promote_types(site.raw.dtype, torch.float32))
    b = torch.linalg.svd(w, full_matrices=False)[0][..., -adapter.r :]
    return site.from_factors(b.new_zeros(*site.lead, adapter.r, site.shape[1]), b)


def halves(u: Tensor, s: Tensor, vh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (..., r, in) and B (..., out, r): the r leading directions of U S V'."""
    root = s[..., :r].sqrt()
    return root[..., None] * vh[..., :r, :], u[..., :r] * root[..., None, :]


def fits(r: int, site: Site, weight: bool = False) -> None:
    """Refuse a rank above the number of directions; ``weight``: of those of the weight itself."""
    if r > (small := min(site.shape)):
        why, other = ", which this start takes from the weight", ", or another init_lora_weights"
        raise ValueError(
            f"r={r} is more than the {small} directions of {site.path} {site.describe()}"
            f"{why * weight}; use r<={small} there (rank_pattern){other * weight}"
        )
