"""VeRA (arXiv 2310.11454): W + diag(b) B diag(d) A; A, B random, frozen, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Shared, Site
from ..fields import probability, whole
from ..inits.drawn import Frozen, kaiming


@dataclass
class VeraConfig(TargetConfig, method="VERA", peft="fan bias save layers"):
    """Two learned vectors a layer around shared random projections."""

    r: int = whole(256)  # rank; of the shared projections
    projection_prng_key: int = 0  # seed of the projections
    save_projection: bool = True  # False: a reader draws them again from the seed
    vera_dropout: float = probability(0.0)  # probability, on the input, in training
    d_initial: float = 0.1  # starting value of d
    init_weights: bool = True  # PEFT's switch; b starts at zero in any case

    def share(self, sites: Sequence[Site]) -> Shared:
        """A (r, widest input) and B (widest output, r), drawn on the CPU: A first, then B."""
        out, in_ = (max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
        a, b = kaiming(self.projection_prng_key, (self.r, in_), (out, self.r))
        return Frozen({"A": "vera_A", "B": "vera_B"}, self.save_projection, A=a, B=b)


class VeRA(LowRank, config=VeraConfig):
    """b (out,) and d (r,); b is zero at the start."""

    keys = {"b": "vera_lambda_b", "d": "vera_lambda_d"}

    def __init__(self, config: VeraConfig, site: Site, shared: Frozen) -> None:
        super().__init__(config, site, shared)
        self.shape, self.r, self.initial = site.shape, config.r, config.d_initial
        self.b, self.d = nn.Parameter(torch.empty(site.shape[0])), nn.Parameter(torch.empty(self.r))
        self.dropout = nn.Dropout(config.vera_dropout)

    def start(self, site: Site) -> None:
        self.b.zero_()
        self.d.fill_(self.initial)

    def factors(self) -> tuple[Tensor, Tensor]:
        out, in_ = self.shape
        a, b = self.shared.A[: self.r, :in_], self.shared.B[:out, : self.r]
        return self.d[:, None] * a, self.b[:, None] * b
