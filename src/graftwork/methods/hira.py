"""HiRA (https://openreview.net/forum?id=TwJrTz9cRS): W + W * (B A), A (r, in), B (out, r)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Embedding, Site
from ..engine.site import as_factors
from ..fields import choice, probability, whole
from ..inits import plain


@dataclass
class HiraConfig(TargetConfig, method="HIRA", peft="exclude fan layers save"):
    """The weight, entry by entry, times a low-rank matrix: a high-rank update."""

    r: int = whole(32)  # rank of the matrix
    hira_dropout: float = probability(0.0)  # probability, on the update's input, in training
    init_weights: Any = choice(True, False, "gaussian")  # "gaussian": A is N(0, 1/r^2)
    rank_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: r there}

    PATTERNS = {"rank_pattern": "r"}


class HiRA(Adapter, config=HiraConfig):
    """A and B in the shapes of LoRA's; B is zero at the start, at an embedding A is."""

    keys = {"A": "hira_A", "B": "hira_B"}
    stacked = True

    def __init__(self, config: HiraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.A, self.B = (nn.Parameter(torch.empty(n)) for n in site.factor_shapes(config.r))
        self.r, self.lead, self.start_name = config.r, site.lead, config.init_weights
        self.dropout = nn.Dropout(config.hira_dropout)
        if isinstance(site, Embedding):
            self.keys = {"A": "hira_embedding_A", "B": "hira_embedding_B"}

    def start(self, site: Site) -> None:
        draw = plain.gaussian if self.start_name == "gaussian" else plain.kaiming
        a, b = draw(self, site) if self.start_name else map(torch.randn_like, (self.A, self.B))
        self.A.copy_(a)
        self.B.copy_(b)

    def update(self, w: Tensor) -> Tensor:
        """W * (B A), (..., out, in)."""
        a, b = as_factors(self.A, self.B, self.lead)
        return w * (b @ a)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.update(w), b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        drop = bool(self.dropout.p) and x.is_floating_point()  # ids have no dropout
        if not self.training or not (drop or layer.parts):
            return super().forward(x, layer)  # one product instead of two
        update = self.update(layer.weights()[0])
        return layer(x) + layer.site.apply(self.dropout(x) if drop else x, update)

    def rank(self) -> None:
        return None  # r bounds the rank of B A, not that of W * (B A)
