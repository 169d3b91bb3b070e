"""TinyLoRA (arXiv 2602.04118): W + B (sum_i v_i P_i) A, where B A is the part of W with the r
largest singular values, the P_i are random, and v is trained: one for a layer, or for several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Embedding, LowRank, Shared, Site
from ..fields import between, choice, probability, whole
from ..inits.drawn import generator


@dataclass
class TinyLoraConfig(TargetConfig, method="TINYLORA", peft="fan bias save layers"):
    """A few trained numbers a layer, or for the whole model."""

    r: int = whole(2)  # how many singular directions
    u: int = whole(64)  # length of v
    weight_tying: float = between(0.0, 0, 1)  # 0: each layer has its own v; 1: all share one
    projection_seed: int = 42  # seed of P at the first layer; each further layer adds one
    save_projection: bool = True  # False: a reader draws P again from the seed
    init_v_bound: float = 0.02  # largest value of v at a start that is not zero
    tinylora_dropout: float = probability(0.0)  # probability, on the input, in training
    init_weights: bool | str = choice(True, False, "uniform")  # True: v starts at zero

    def share(self, sites: Sequence[Site]) -> Shared:
        return Vectors(self, [site.name for site in sites])


class Vectors(Shared):
    """One v (u,) for each group of neighbouring layers."""

    def __init__(self, config: TinyLoraConfig, names: list[str]) -> None:
        super().__init__()
        groups = max(1, round(len(names) * (1 - config.weight_tying)))
        size, last = len(names) // groups, groups - 1
        self.place = {name: (i, min(i // size, last)) for i, name in enumerate(names)}
        self.v = nn.ParameterList(nn.Parameter(torch.empty(config.u)) for _ in range(groups))
        self.keys = {f"v.{i}": f"tinylora_v.{i}" for i in range(groups)}
        self.bound = 0.0 if config.init_weights is True else config.init_v_bound

    def start(self) -> None:
        for v in self.v:
            v.uniform_(-self.bound, self.bound)


class TinyLoRA(LowRank, config=TinyLoraConfig):
    """A (..., r, in) and B (..., out, r), of the transposed weight at an embedding; P (u, r, r)."""

    keys = {"A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P"}
    stacked = True

    def __init__(self, config: TinyLoraConfig, site: Site, shared: Vectors) -> None:
        super().__init__(config, site, shared)
        self.index, self.group = shared.place[site.name]
        self.table = isinstance(site, Embedding)  # whose (vocabulary, width) PEFT decomposes
        out, in_ = reversed(site.shape) if self.table else site.shape
        self.r = min(config.r, out, in_)
        self.A = nn.Buffer(torch.empty(*site.lead, self.r, in_))
        self.B = nn.Buffer(torch.empty(*site.lead, out, self.r))
        p = torch.empty(config.u, self.r, self.r)
        self.P = nn.Buffer(p, persistent=config.save_projection)
        self.seed, self.dropout = config.projection_seed, nn.Dropout(config.tinylora_dropout)

    def start(self, site: Site) -> None:
        w = site.weight.float()
        u, s, v = torch.linalg.svd(w.mT if self.table else w, full_matrices=False)
        root = s[..., : self.r].sqrt()
        self.A.copy_(root[..., None] * v[..., : self.r, :])
        self.B.copy_(u[..., : self.r] * root[..., None, :])

    def derive(self, site: Site) -> None:
        drawn = generator(self.seed + self.index)
        std = self.r**-0.5
        self.P.copy_(torch.normal(0.0, std, self.P.shape, generator=drawn, device="cpu"))

    def factors(self) -> tuple[Tensor, Tensor]:
        b = self.B @ torch.einsum("i,ijk->jk", self.shared.v[self.group], self.P)
        return (b.mT, self.A.mT) if self.table else (self.A, b)
