"""PVeRA (arXiv 2512.07703): y + b B z, z ~ N(mu, e^v) in training and mu after it, with
(mu, v) = d A x; A, B random, frozen, shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Shared, Site
from ..fields import probability, whole
from ..inits.drawn import Frozen, generator, kaiming


@dataclass
class PveraConfig(TargetConfig, method="PVERA", peft="fan bias save layers"):
    """VeRA whose hidden channels are sampled in training: a mean and a spread for each."""

    r: int = whole(256)  # rank; of the shared projections
    projection_prng_key: int = 0  # seed of the projections
    save_projection: bool = True  # False: a reader draws them again from the seed
    pvera_dropout: float = probability(0.0)  # probability, on the input, in training
    d_initial: float = 0.1  # starting value of d
    init_weights: bool = True  # False: b is one and d is normal, so the start is not the base
    sample_at_inference: bool = False  # whether z is sampled then too
    generator_seed: int | None = None  # seed of each layer's samples; None: torch's own

    def share(self, sites: Sequence[Site]) -> Shared:
        """A (2 r, widest input), of means and of spreads, and B (widest output, r)."""
        r = max(self.at(s.path, s.parameter).r for s in sites)  # overrides may differ
        out, in_ = (max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
        a, b = kaiming(self.projection_prng_key, (2 * r, in_), (out, r))
        return Frozen({"A": "pvera_A", "B": "pvera_B"}, self.save_projection, A=a, B=b)


class PVeRA(LowRank, config=PveraConfig):
    """b (..., out) and d (..., 2 r); b is zero at the start."""

    keys = {"b": "pvera_lambda_b", "d": "pvera_lambda_d"}
    stacked = True
    products_in: tuple[bool, ...] = (False,)

    def __init__(self, config: PveraConfig, site: Site, shared: Frozen) -> None:
        super().__init__(config, site, shared)
        self.shape, self.r, self.always = site.shape, config.r, config.sample_at_inference
        self.b = nn.Parameter(torch.empty(*site.lead, site.shape[0]))
        self.d = nn.Parameter(torch.empty(*site.lead, 2 * self.r))
        self.dropout = nn.Dropout(config.pvera_dropout)
        self.initial = config.d_initial if config.init_weights else None
        seed = config.generator_seed
        self.noise = None if seed is None else generator(seed)
        if self.always:
            self.products_in = ()
            self.FORBIDS = {
                "merge": "its output is sampled; with sample_at_inference=False it is the mean"
            }

    def start(self, site: Site) -> None:
        if self.initial is None:
            self.b.fill_(1)
            self.d.normal_()
        else:
            self.b.zero_()
            self.d.fill_(self.initial)

    def rows(self) -> tuple[Tensor, Tensor]:
        """d A in its halves, (..., r, in) each: what gives the means, and the log-variances."""
        a = self.shared.A.unflatten(0, (2, -1))[:, : self.r, : self.shape[1]]
        d = self.d.reshape(*self.d.shape[:-1], 2, -1, 1)
        mean, spread = (d * a).unbind(-3)
        return mean, spread

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.rows()[0], self.b[..., None] * self.shared.B[: self.shape[0], : self.r]

    def branch(self, x: Tensor, site: Site) -> Tensor:
        if not (self.training or self.always):
            return super().branch(x, site)
        mu, v = (site.reduce(x, rows) for rows in self.rows())
        return site.expand(mu + (v / 2).exp() * self.normal(mu), self.factors()[1])

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers; a seed draws them on the CPU, alike on every device."""
        if self.noise is None:
            return torch.randn_like(like)
        return torch.randn(like.shape, generator=self.noise, device="cpu").to(like)
