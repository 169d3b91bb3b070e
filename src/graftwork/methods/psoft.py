"""PSOFT (arXiv 2505.11235): W + B (R - I) A, where B A = U S V' is the part of W with the r largest
singular values, and R = diag(b) C diag(a); C = (I + Q) (I - Q)^-1, Q skew, is orthogonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Site
from ..fields import choice, probability, whole
from ..inits.drawn import seeded
from .rotation import cayley, neumann


@dataclass
class PsoftConfig(TargetConfig, method="PSOFT", peft="exclude fan save layers"):
    """Rotations of the weight's principal subspace."""

    r: int = whole(32)  # its dimension
    psoft_alpha: int = 32  # PEFT's; B is divided by the scale that it gives, so it does nothing
    psoft_dropout: float = probability(0.0)  # probability, on the input, in training
    ab_svd_init: str = choice("psoft_init", "pissa_init")  # A = V', B = U S; or each has sqrt(S)
    psoft_svd: str = choice("full", "lowrank")  # "lowrank" is random and faster
    psoft_svd_lowrank_niter: int = 10  # rounds of that
    random_seed: int = 0  # of that; a file's reader finds A and B again with it
    psoft_orth: bool = True  # False: C is any matrix
    psoft_mag_b: bool = True  # False: without b
    psoft_mag_a: bool = True  # False: without a
    use_cayley_neumann: bool = False  # C as a sum of powers of Q, nearly orthogonal
    num_cayley_neumann_terms: int = whole(5, least=2)  # of that sum
    cayley_neumann_eps: float | None = None  # bound for ||Q|| there
    init_weights: bool = True  # False: not the identity at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        if (eps := self.cayley_neumann_eps) is not None and not 0 < eps < 1:
            raise ValueError(f"cayley_neumann_eps={eps} is not between 0 and 1; try 0.9")


class PSOFT(LowRank, config=PsoftConfig):
    """v (r (r - 1) / 2,) is the upper triangle of Q, 0 at the start; or v (r, r) is C itself."""

    keys = {
        "v": "psoft_R.weight", "b": "psoft_R.vector_b", "a": "psoft_R.vector_a"
    }  # fmt: skip

    def __init__(self, config: PsoftConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), m, r = site.shape, min(site.shape), config.r
        if r > m:
            raise ValueError(
                f"r={r} is above the {m} directions of {site.name} {site.describe()}; try r={m}"
            )
        rows, columns = torch.triu_indices(r, r, 1)
        self.A = nn.Buffer(torch.empty(r, in_), persistent=False)
        self.B = nn.Buffer(torch.empty(out, r), persistent=False)
        self.upper = nn.Buffer(rows * r + columns, persistent=False)
        self.v = nn.Parameter(torch.empty(len(rows) if config.psoft_orth else (r, r)))
        self.b = nn.Parameter(torch.empty(r)) if config.psoft_mag_b else None
        self.a = nn.Parameter(torch.empty(r)) if config.psoft_mag_a else None
        self.drawn = ("A", "B") if config.psoft_svd == "lowrank" else ()
        self.config, self.r, self.dropout = config, r, nn.Dropout(config.psoft_dropout)

    def derive(self, site: Site) -> None:
        w, config, r = site.weight.float(), self.config, self.r
        if config.psoft_svd == "lowrank":
            with seeded(config.random_seed, w.device):
                u, s, right = torch.svd_lowrank(w, q=r, niter=config.psoft_svd_lowrank_niter)
            v = right.mT
        else:
            u, s, v = torch.linalg.svd(w, full_matrices=False)
        power = 0.5 if config.ab_svd_init == "pissa_init" else 0.0
        self.A.copy_(s[:r, None] ** power * v[:r])
        self.B.copy_(u[:, :r] * s[:r] ** (1 - power))

    def start(self, site: Site) -> None:
        for gain in (self.a, self.b):
            if gain is not None:
                gain.fill_(1.0)
        nn.init.zeros_(self.v) if self.config.psoft_orth else nn.init.eye_(self.v)
        if not self.config.init_weights:
            self.v.add_(0.1 * torch.randn_like(self.v))

    def turn(self) -> Tensor:
        """C, (r, r)."""
        if not self.config.psoft_orth:
            return self.v
        q = self.v.new_zeros(self.r**2).index_copy(0, self.upper, self.v).view(self.r, self.r)
        q = q - q.mT
        if not self.config.use_cayley_neumann:
            return cayley(-q)
        if eps := self.config.cayley_neumann_eps:
            q = q * (eps / (torch.linalg.matrix_norm(q) + 1e-12)).clamp(max=1)
        return neumann(q, self.config.num_cayley_neumann_terms)

    def factors(self) -> tuple[Tensor, Tensor]:
        R = self.turn()
        R = R if self.b is None else self.b[:, None] * R
        R = R if self.a is None else R * self.a
        return self.A, self.B @ (R - torch.eye(self.r, dtype=R.dtype, device=R.device))
