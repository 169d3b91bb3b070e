"""VeRA (arXiv 2310.11454): W + diag(b) B diag(d) A; A, B random, frozen, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Shared, Site
from ..fields import probability, whole
from ..inits.drawn import kaiming


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
        return Projections(self, max(s.shape[0] for s in sites), max(s.shape[1] for s in sites))


class Projections(Shared):
    """A (r, widest input) and B (widest output, r), drawn on the CPU: A first, then B."""

    keys = {"A": "vera_A", "B": "vera_B"}

    def __init__(self, config: VeraConfig, out: int, in_: int) -> None:
        super().__init__()
        a, b = kaiming(config.projection_prng_key, (config.r, in_), (out, config.r))
        self.A = nn.Buffer(a, persistent=config.save_projection)
        self.B = nn.Buffer(b, persistent=config.save_projection)


class VeRA(LowRank, config=VeraConfig):
    """b (out,) and d (r,); b is zero at the start."""

    keys = {"b": "vera_lambda_b", "d": "vera_lambda_d"}

    def __init__(self, config: VeraConfig, site: Site, shared: Projections) -> None:
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
