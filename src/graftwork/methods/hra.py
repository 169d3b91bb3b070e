"""HRA (arXiv 2405.17484): W' = W H_1 ... H_r with Householder reflections H = I - 2 u u' / ||u||^2.

Their product is I - U M U' (the compact WY form), where M^-1 is the upper triangle of U'U with half
of its diagonal; with Gram-Schmidt, U = Q R, it is I - 2 Q Q'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Site
from ..errors import warn
from ..fields import whole
from .rotation import Rotation


@dataclass
class HRAConfig(TargetConfig, method="HRA", peft="exclude bias save layers"):
    """A chain of r reflections of the inputs."""

    r: int = whole(8)  # number of reflections; even, so that the chain can start as the identity
    apply_GS: bool = False  # noqa: N815 - PEFT's name; directions made orthogonal first
    init_weights: bool = True  # False: not the identity at the start


class HRA(Rotation, config=HRAConfig):
    """u (in, r); at the start two equal columns side by side, whose reflections cancel."""

    keys = {"u": "hra_u"}

    def __init__(self, config: HRAConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        if config.apply_GS and config.r > self.n:
            raise ValueError(
                f"r={config.r} directions cannot be orthogonal among the {self.n} inputs of "
                f"{site.path} {site.describe()}; use r<={self.n}, or apply_GS=False"
            )
        self.u = nn.Parameter(torch.empty(self.n, config.r))
        self.orthogonal, self.paired = config.apply_GS, config.init_weights

    def start(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.u, a=5**0.5)
        if not self.paired:
            return
        if self.orthogonal or self.u.shape[1] % 2:
            why = "orthogonal reflections" if self.orthogonal else "an odd number of reflections"
            return warn(
                f"{why} cannot be the identity, so training at {site.path} does not begin at the "
                "base model: give an even r without apply_GS, or init_weights=False where it is "
                "meant"
            )
        nn.init.kaiming_uniform_(self.u[:, ::2], a=5**0.5)
        self.u[:, 1::2] = self.u[:, ::2]

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        u = self.u
        if self.orthogonal:
            q: Tensor = torch.linalg.qr(u).Q
            return x - 2 * (x @ q) @ q.mT
        g = u.mT @ u
        m = g.triu() - g.diagonal().diag_embed() / 2  # M^-1
        right: Tensor = torch.linalg.solve(m if back else m.mT, u.mT)
        return x - (x @ u) @ right
