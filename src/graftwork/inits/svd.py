"""Starts from the base weight's own directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.site import Site
from .drawn import seeded


def pissa(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """PiSSA (arXiv 2404.02948): W = U S V'; A = sqrt(S_r / s) V_r', B = U_r sqrt(S_r / s)."""
    u, s, vh = torch.linalg.svd(site.weight.to(torch.float32), full_matrices=False)
    return _split(adapter, site, u, s, vh)


def fast_pissa(name: str) -> Callable[[Any, Site], tuple[Tensor, Tensor]]:
    """``pissa_niter_N``: the same by N rounds of randomised iteration, from one seed."""
    rounds = name.removeprefix("pissa_niter_")
    if not rounds.isdigit():
        raise ValueError(
            f"init_lora_weights={name!r} needs a number of iterations, such as 'pissa_niter_4'"
        )

    def start(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
        with seeded(0, site.raw.device):  # a file's reader must find the same factors again
            u, s, v = torch.svd_lowrank(
                site.weight.to(torch.float32), q=adapter.r, niter=int(rounds)
            )
        return _split(adapter, site, u, s, v.mT)

    return start


def olora(adapter: Any, site: Site) -> tuple[Tensor, Tensor]:
    """OLoRA (arXiv 2406.01775): W = Q R; B = Q[:, :r], A = R[:r]."""
    _fits(adapter, site)
    q, r = torch.linalg.qr(site.weight.to(torch.float32))
    return site.from_factors(r[..., : adapter.r, :], q[..., : adapter.r])


def _split(adapter: Any, site: Site, u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    _fits(adapter, site)
    root = (s[..., : adapter.r] / adapter.scale).sqrt()
    return site.from_factors(
        root[..., None] * vh[..., : adapter.r, :], u[..., : adapter.r] * root[..., None, :]
    )


def _fits(adapter: Any, site: Site) -> None:
    if adapter.r > min(site.shape):
        raise ValueError(
            f"r={adapter.r} is more than the {min(site.shape)} directions of {site.path} "
            f"{site.describe()}, which this start takes from the weight; use r<={min(site.shape)} "
            "there (rank_pattern), or another init_lora_weights"
        )
