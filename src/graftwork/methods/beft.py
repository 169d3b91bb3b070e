"""BEFT (arXiv 2509.15974): y' = W x + b + v, the bias of some layers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Embedding, Site
from ..engine.adapter import NOTHING
from ..engine.site import ParameterSite


@dataclass
class BeftConfig(TargetConfig, method="BEFT", peft="save"):
    """A bias for each adapted layer, of the values by default."""

    init_weights: bool = True  # False: not zero at the start


class BEFT(Adapter, config=BeftConfig):
    """v (1, out), zero at the start: a bias, or added to every row of an embedding."""

    keys = {"bias": "beft_bias"}
    stacked = True
    FORBIDS = {
        "parameters": "no bias can be added to what a module's own code computes with a parameter"
    }

    def __init__(self, config: BeftConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        if isinstance(site, ParameterSite):
            raise ValueError(
                f"BEFT cannot sit at {site.name}: {self.FORBIDS['parameters']}; train the module's "
                "own biases, with BitFit or with bias='all' in another method"
            )
        self.bias = nn.Parameter(torch.empty(1, site.shape[0]))
        self.rows, self.random = isinstance(site, Embedding), not config.init_weights

    def start(self, site: Site) -> None:
        self.bias.normal_() if self.random else self.bias.zero_()

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.rows:
            return w + self.bias.mT, b
        return w, self.bias[0] if b is None else b + self.bias[0]

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        return *NOTHING, self.bias[0]

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if self.rows:
            return super().forward(x, layer)
        return layer(x) + layer.site.outputs(self.bias[0])
