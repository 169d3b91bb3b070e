"""DeLoRA (arXiv 2503.18225): W + l / r sum_i (b_i / ||b_i||) (a_i / ||a_i||)' diag(n), n the norms
of W's columns: direction and strength apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Site
from ..fields import probability, whole


@dataclass
class DeloraConfig(TargetConfig, method="DELORA", peft="exclude bias layers save"):
    """A low-rank update of unit directions, as strong as one learned number says."""

    r: int = whole(8)  # rank
    delora_lambda: float = 15  # starting value of l
    module_dropout: float = probability(0.0)  # probability, on the update's input, in training
    init_weights: bool = True  # False: the update does not start at zero
    rank_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: r there}
    lambda_pattern: Any = field(default_factory=dict)  # the same for delora_lambda

    PATTERNS = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}


class DeLoRA(LowRank, config=DeloraConfig):
    """A (..., r, in), B (..., out, r), l (..., 1), n (..., in); B is zero at the start."""

    keys = {
        "A": "delora_A", "B": "delora_B", "l": "delora_lambda", "n": "delora_w_norm",
    }  # fmt: skip
    stacked = True

    def __init__(self, config: DeloraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), self.r = site.shape, config.r
        shapes = (self.r, in_), (out, self.r), (1,)
        self.A, self.B, self.l = (nn.Parameter(torch.empty(*site.lead, *n)) for n in shapes)
        self.n = nn.Buffer(torch.ones(*site.lead, in_))
        self.initial, self.zero = config.delora_lambda, config.init_weights
        self.dropout = nn.Dropout(config.module_dropout)

    def start(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.B.zero_() if self.zero else nn.init.kaiming_uniform_(self.B, a=5**0.5)
        self.l.fill_(self.initial)
        self.n.copy_(torch.linalg.vector_norm(site.weight.to(self.n), dim=-2))

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = unit(self.A, -1), unit(self.B, -2)
        return a * self.n[..., None, :], b * (self.l[..., None] / self.r)


def unit(v: Tensor, dim: int) -> Tensor:
    """``v`` by its norm, which is no less than 1e-4: B begins at zero."""
    norm: Tensor = torch.linalg.vector_norm(v, dim=dim, keepdim=True)
    return v / norm.clamp(min=1e-4)
