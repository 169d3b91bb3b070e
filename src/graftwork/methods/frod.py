"""FRoD (doi 10.1609/aaai.v40i31.39813): W = U diag(l0) V', W' = U (S + diag(l)) V'; V is common to
the layers of one category, S sparse, the columns of U have length one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Additive, Shared, Site
from ..errors import warn
from ..fields import between, probability
from .joint import Bases, category


@dataclass
class FrodConfig(TargetConfig, method="FROD", peft="fan bias save layers"):
    """Coordinates in a basis that layers share: a full-rank update with few numbers."""

    projection_prng_key: int = 0  # seed of the places of S
    save_projection: bool = True  # False: a reader finds V and the places of S again
    frod_dropout: float = probability(0.0)  # probability, on the input, in training
    init_weights: bool = True  # False: not the identity at the start
    sparse_rate: float = between(0.01, 0, 1)  # the part of S that is not zero
    regularization_alpha: float = 1e-3  # ridge in finding V
    progressbar: bool = True  # PEFT's; there is none here
    runtime_offload_base_weight: bool = False  # PEFT's; the base weight is used here

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runtime_offload_base_weight:
            warn("runtime_offload_base_weight has no effect: the update is added to the base")

    def share(self, sites: Sequence[Site]) -> Shared:
        return Bases(self, sites)


class FRoD(Additive, config=FrodConfig):
    """l (in,), l0 at the start, and the entries s of S, zero at the start."""

    keys = {"l": "frod_lambda_l", "s": "frod_lambda_s_values"}
    stacked = True

    def __init__(self, config: FrodConfig, site: Site, shared: Bases) -> None:
        super().__init__(config, site, shared)
        self.name, self.category, n = site.name, category(site.name), site.shape[1]
        count = shared.of("s_indices", self.category).shape[1]
        self.l = nn.Parameter(torch.empty(*site.lead, n))
        self.s = nn.Parameter(torch.empty(*site.lead, count))
        self.dropout, self.random = nn.Dropout(config.frod_dropout), not config.init_weights

    def start(self, site: Site) -> None:
        self.s.normal_(std=0.1) if self.random else self.s.zero_()
        self.l.copy_(self.shared.of("l0", self.name))
        if self.random:
            self.l.add_(torch.randn_like(self.l), alpha=0.1)

    def outer(self) -> tuple[Tensor, Tensor]:
        """U (..., out, in) and V (in, in)."""
        return self.shared.of("U", self.name), self.shared.of("V", self.category)

    def middle(self) -> Tensor:
        """S + diag(l - l0), (in, in)."""
        row, column = self.shared.of("s_indices", self.category)
        change = self.l - self.shared.of("l0", self.name)
        n = change.shape[-1]
        flat = torch.diag_embed(change).flatten(-2).index_add(-1, row * n + column, self.s)
        return flat.reshape(*change.shape, n)

    def delta(self) -> Tensor:
        u, v = self.outer()
        return u @ self.middle() @ v.mT

    def branch(self, x: Tensor, site: Site) -> Tensor:
        if not (site.pointwise and x.is_floating_point()):
            return super().branch(x, site)
        u, v = self.outer()
        return x @ v @ self.middle().mT @ u.mT
