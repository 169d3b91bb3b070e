"""AdaMSS (OpenReview 8ZdWmpYxT0): [W|b] + D, D[rows_i] = B_i A_i V, where V are right singular
vectors of [W|b] and rows_i a cluster of its left ones, by k-means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Site
from ..fields import choice, positive, whole
from .clusters import Clustered, clusters, directions, singular, stop


@dataclass
class AdamssConfig(TargetConfig, method="ADAMSS", peft="save layers"):
    """A small update for each cluster of outputs; with ASA the least important stop training."""

    r: int = whole(100)  # singular vectors
    num_subspaces: int = whole(5)  # clusters
    subspace_rank: int = whole(1)  # rank of a cluster's update
    init_weights: Any = choice("orthogonal", None, False)  # None: not the identity
    use_asa: bool = False  # adaptive subspace allocation; what follows is its schedule
    asa_target_subspaces: int = whole(50)  # how many clusters of the whole model train to the end
    init_warmup: int = 50  # the step from which on clusters are stopped
    final_warmup: int = 1000  # the step at which only the target is left
    mask_interval: int = whole(100)  # steps between two choices
    asa_importance_beta: float = 0.85  # smoothing of the importance
    asa_uncertainty_beta: float = 0.85  # smoothing of its uncertainty
    asa_schedule_exponent: float = positive(3.0)  # how much sooner than evenly they are stopped
    use_dynamic_rank: bool = False  # a cluster's rank follows its singular values
    svd_threshold: float = 0.1  # of the largest squared one; smaller ones do not count
    random_seed: int = 0  # of the decomposition

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_weights = self.init_weights or None
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ValueError("use_asa needs init_warmup < final_warmup")

    def has_schedule(self) -> bool:
        return self.use_asa

    @torch.no_grad()
    def after_step(self, adapters: Mapping[str, Any], step: int) -> None:
        """Stop the least important clusters, as the schedule says; PEFT counts steps from 0."""
        now, parts = step - 1, list(adapters.values()) if self.use_asa else []
        if self.init_warmup <= now <= self.final_warmup:
            for a in parts:
                a.observe(self.asa_importance_beta, self.asa_uncertainty_beta)
            if now % self.mask_interval == 0:
                left = (self.final_warmup - now) / (self.final_warmup - self.init_warmup)
                stop(parts, self.asa_target_subspaces, left**self.asa_schedule_exponent)
        for a in parts:
            a.rest()


class AdaMSS(Clustered, config=AdamssConfig):
    """A_i (k_i, r) and B_i (outputs, k_i), zero at the start; of stacked weights, all the rows."""

    stacked = True
    drawn = ("place",)

    def __init__(self, config: AdamssConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        u, v = singular(site, config.r, config.random_seed)
        self.V = nn.Buffer(v)
        rows = clusters(u, config.num_subspaces)
        self.place = nn.Buffer(torch.cat(rows).argsort(), persistent=False)
        self.trains = nn.Buffer(torch.ones(len(rows), dtype=torch.bool), persistent=False)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        least = config.svd_threshold if config.use_dynamic_rank else -1
        for mine in rows:  # the shapes follow from the weight, so A is found here too
            self.A.append(nn.Parameter(directions(u[mine], config.subspace_rank, least)))
            self.B.append(nn.Parameter(torch.zeros(len(mine), len(self.A[-1]))))
        self.inputs, self.random = site.shape[1], config.init_weights is None
        self.sizes, self.r = (*site.lead, site.shape[0]), min(sum(map(len, self.A)), *site.shape)
        self.keys = {"V": "adamss_newB"} | {n: f"adamss_{n}" for n, _ in self.named_parameters()}

    def start(self, site: Site) -> None:
        for b in self.B:
            b.normal_(std=0.01) if self.random else b.zero_()

    def columns(self) -> Tensor:
        """B (..., outputs, clusters' ranks)."""
        b: Tensor = torch.block_diag(*self.B)  # type: ignore[no-untyped-call]
        return b[self.place].reshape(*self.sizes, -1)

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([*self.A]) @ self.V[:, : self.inputs], self.columns()

    def shift(self) -> Tensor | None:
        if self.V.shape[1] == self.inputs:
            return None
        return self.columns() @ (torch.cat([*self.A]) @ self.V[:, -1])
