"""PEANuT (arXiv 2410.01870): W' = W + s B h(W)', h(W) = D(E(f(W'A'))): a network over the base
weight itself, with E and D stages of f(h E_i') and f(h D_i'), joined as in a U-net by sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Site
from ..fields import check_choice, whole
from .bottleneck import FUNCTIONS


@dataclass
class PeanutConfig(TargetConfig, method="PEANUT", peft="exclude save layers"):
    """An update that a small network computes from the weight."""

    r: int = whole(32)  # width of the network
    depth: int = whole(0)  # how many stages E_i, and as many D_i
    act_fn: str = "relu"  # f, as transformers calls it
    scaling: float = 1.0  # s
    init_weights: bool = True  # False: not the identity at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        self.function()

    def function(self) -> Callable[[Tensor], Tensor]:
        """f, without importing transformers for the usual ones."""
        if self.act_fn in FUNCTIONS:
            return FUNCTIONS[self.act_fn]
        from transformers.activations import ACT2FN

        check_choice(self.act_fn, "act_fn", sorted(ACT2FN))
        f: nn.Module = ACT2FN[self.act_fn]
        if any(True for _ in f.parameters()):
            raise ValueError(f"act_fn={self.act_fn!r} has weights, which no file holds; try 'relu'")
        return f


class PEANuT(Adapter, config=PeanutConfig):
    """A (r, out), E and D (depth, r, r), B (out, r), which is zero at the start."""

    def __init__(self, config: PeanutConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        out, r = site.shape[0], config.r
        self.A, self.B = nn.Parameter(torch.empty(r, out)), nn.Parameter(torch.empty(out, r))
        self.E, self.D = (
            nn.ParameterList(nn.Parameter(torch.empty(r, r)) for _ in range(config.depth))
            for _ in range(2)
        )
        self.keys = {"A": "peanut_A.weight", "B": "peanut_B.weight"}
        for i in range(config.depth):
            self.keys[f"E.{i}"] = f"peanut_encoders.{i}.weight"
            self.keys[f"D.{i}"] = f"peanut_decoders.{i}.weight"
        self.r, self.scale, self.zero = r, config.scaling, config.init_weights
        self.f = config.function()

    def start(self, site: Site) -> None:
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=5**0.5)
        if self.zero:
            self.B.zero_()

    def network(self, w: Tensor) -> Tensor:
        """h(W), (in, r)."""
        h, down = self.f(w.mT @ self.A.mT), []
        for e in self.E:
            down.append(h)
            h = self.f(h @ e.mT)
        for d in self.D:
            h = self.f(h @ d.mT) + down.pop()
        return h

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.scale * self.B @ self.network(w).mT, b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        h = self.network(layer.weights()[0])
        return layer(x) + layer.site.low_rank(x, h.mT, self.scale * self.B)
