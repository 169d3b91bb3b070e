"""BEFT (arXiv 2509.15974): y' = W x + b + v, the bias of some layers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Embedding, Site
from ..engine.site import ParameterSite


@dataclass
class BeftConfig(TargetConfig, method="BEFT", peft="save"):
    """A bias for each adapted layer, of the values by default."""

    init_weights: bool = True  # False: not zero at the start


class BEFT(Adapter, config=BeftConfig):
    """v (1, out), zero at the start: a bias, or added to every row of an embedding."""

    keys = {"bias": "beft_bias", "row": "beft_bias"}
    stacked = True
    FORBIDS = {
        "parameters": "no bias can be added to what a module's own code computes with a parameter"
    }
    bias: nn.Parameter | None
    row: nn.Parameter | None

    def __init__(self, config: BeftConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        if isinstance(site, ParameterSite):
            raise ValueError(
                f"BEFT cannot sit at {site.name}: {self.FORBIDS['parameters']}; train the module's "
                "own biases, with BitFit or with bias='all' in another method"
            )
        v = nn.Parameter(torch.empty(1, site.shape[0]))
        self.bias, self.row = (None, v) if isinstance(site, Embedding) else (v, None)
        self.random = not config.init_weights

    def start(self, site: Site) -> None:
        for v in self.parameters():
            v.normal_() if self.random else v.zero_()

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.row is not None:
            return w + self.row.mT, b
        assert self.bias is not None
        return w, self.bias[0] if b is None else b + self.bias[0]

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if self.bias is None:
            return super().forward(x, layer)
        return layer(x) + layer.site.outputs(self.bias[0])
