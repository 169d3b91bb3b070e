"""DEFT (arXiv 2509.22793): W' = W - Q N'W + s Q R, s = alpha / r: what N reads of the outputs goes
along Q, and R comes in its place; Q = P and N = relu(P), or both an orthonormal basis of P."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Site
from ..fields import choice, probability, whole


@dataclass
class DeftConfig(TargetConfig, method="DEFT", peft="exclude fan bias save layers"):
    """A subspace of the outputs, taken out and learned anew."""

    r: int = whole(8)  # dimension of the subspace
    decomposition_method: str = choice("relu", "qr")  # of P; "qr": an orthonormal basis
    init_scale: float = 1.0  # of R, where it starts at random
    alpha: int | None = None  # R is scaled by alpha / r; None: by 1
    para: bool = False  # without R: the subspace is only taken out (PaRa)
    deft_dropout: float = probability(0.0)  # probability, on the input of R, in training
    init_weights: bool = True  # False: R starts at random, which is not the identity


class DEFT(Adapter, config=DeftConfig):
    """P (out, r) and R (r, in), which starts at N'W / s."""

    keys = {"P": "deft_P", "R": "deft_R"}

    def __init__(self, config: DeftConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), self.r = site.shape, min(config.r, site.shape[0])
        self.P = nn.Parameter(torch.empty(out, self.r))
        self.R = None if config.para else nn.Parameter(torch.empty(self.r, in_))
        self.scale = config.alpha / self.r if config.alpha else 1.0
        self.qr, self.dropout = config.decomposition_method == "qr", nn.Dropout(config.deft_dropout)
        self.std = None if config.init_weights else 0.02 * config.init_scale

    def start(self, site: Site) -> None:
        self.P.normal_(std=0.02)
        if self.R is not None:
            n = self.basis()[1]
            now = n.mT @ site.weight.to(n.dtype) / self.scale
            self.R.copy_(now) if self.std is None else self.R.normal_(std=self.std)

    def basis(self) -> tuple[Tensor, Tensor]:
        """Q and N, (out, r) each."""
        if not self.qr:
            return self.P, self.P.relu()
        q = torch.linalg.qr(self.P)[0]
        return q, q

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, n = self.basis()
        new = -n.mT @ w if self.R is None else self.scale * self.R - n.mT @ w  # (r, in)
        return w + q @ new, b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        (q, n), y, site = self.basis(), layer(x), layer.site
        if site.pointwise:
            b = layer.bias
            y = y - (y if b is None else y - b) @ n @ q.mT
        else:
            y = y - site.low_rank(x, n.mT @ layer.weights()[0], q)
        if self.R is None:
            return y
        x = self.dropout(x) if x.is_floating_point() else x
        return y + site.low_rank(x, self.scale * self.R, q)
