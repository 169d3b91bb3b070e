"""OSF (arXiv 2504.07097): W = U_h S_h V_h + U S V; the largest singular directions stay, U S V of
the others trains, with the gradients of U and V projected out of what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Site
from ..patterns import regex


@dataclass
class OSFConfig(TargetConfig, method="OSF", peft="save"):
    """How much of a weight stays; a fraction of its smaller side, or a number of directions."""

    effective_rank: Any = None  # what stays: 0.5 if None
    rank_pattern: Any = None  # {regex for a part of a path: effective_rank there}
    init_weights: bool = True  # False: not the identity at the start
    target_svd_config: Any = None  # PEFT's, which does not use it either

    def changes(self, path: str, parameter: str) -> dict[str, Any]:
        found = super().changes(path, parameter)
        for pattern, rank in reversed((self.rank_pattern or {}).items()):
            if regex(pattern).search(path):
                found["effective_rank"] = rank
        return found

    def kept(self, site: Site) -> int:
        """How many of a layer's singular directions stay."""
        wish, m = self.effective_rank or 0.5, min(site.shape)
        kept = int(m * wish if isinstance(wish, float) and wish <= 1 else wish)
        if not 0 < kept < m:
            remedy = f"try effective_rank={m // 2}" if m > 1 else "leave this layer out"
            raise ValueError(
                f"effective_rank={wish} of the {m} singular directions of {site.name} "
                f"{site.describe()}: at least one must stay and one train; {remedy}"
            )
        return kept


class OSF(LowRank, config=OSFConfig):
    """U (out, k), S (k,), V (k, in); they start at U0, S0, V0, the part of W that they replace."""

    keys = {
        "U": "osf_svd_params.U_low", "S": "osf_svd_params.S_low", "V": "osf_svd_params.V_low",
    }  # fmt: skip
    stacked = True
    U0: Tensor
    S0: Tensor
    V0: Tensor
    Uh: Tensor | None  # what stays, where U0 does not span everything else
    Vh: Tensor | None

    def __init__(self, config: OSFConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), self.high = site.shape, config.kept(site)
        k = min(site.shape) - self.high
        shapes = (out, k), (k,), (k, in_)
        self.U, self.S, self.V = (nn.Parameter(torch.empty(*site.lead, *n)) for n in shapes)
        for name in ("U0", "S0", "V0", "Uh", "Vh"):
            self.register_buffer(name, None, persistent=False)
        self.r, self.random = min(2 * k, *site.shape), not config.init_weights

    def derive(self, site: Site) -> None:
        u, s, v = torch.linalg.svd(site.weight.float(), full_matrices=False)
        n, (out, in_) = self.high, site.shape
        self.U0, self.S0, self.V0 = u[..., n:].clone(), s[..., n:].clone(), v[..., n:, :].clone()
        self.Uh = u[..., :n].clone() if out > in_ else None
        self.Vh = v[..., :n, :].clone() if in_ > out else None

    def start(self, site: Site) -> None:
        for p, value in zip((self.U, self.S, self.V), (self.U0, self.S0, self.V0), strict=True):
            p.normal_() if self.random else p.copy_(value)

    def factors(self) -> tuple[Tensor, Tensor]:
        u = outside(self.U, self.U0, self.Uh)
        v = outside(self.V.mT, self.V0.mT, None if self.Vh is None else self.Vh.mT).mT
        b = torch.cat([u * self.S[..., None, :], -self.U0 * self.S0[..., None, :]], dim=-1)
        return torch.cat([v, self.V0], dim=-2), b


def outside(x: Tensor, low: Tensor, high: Tensor | None) -> Tensor:
    """x, whose gradient is taken without what lies along the columns of ``high``; where that is
    None, along those of ``low`` alone, which is the same."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(  # type: ignore[no-untyped-call]
            lambda g: low @ (low.mT @ g) if high is None else g - high @ (high.mT @ g)
        )
    return x
