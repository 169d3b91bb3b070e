"""Lily (arXiv 2407.09946): y + s x A' sum_i p_i B_i, p the mean of softmax(R x A') over all the
positions of the adapter's rows; neighbouring layers share A, those of a name the experts B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Shared, Site
from ..fields import whole


@dataclass
class LilyConfig(TargetConfig, method="LILY", peft="exclude save layers"):
    """Low-rank experts shared across layers, mixed by what a layer sees."""

    r: int = whole(32)  # rank
    stride_A: int = whole(1)  # noqa: N815 - PEFT's name; so many neighbouring layers share A
    num_B: int = whole(2)  # noqa: N815 - PEFT's name; experts
    scaling: float = 1.0  # s
    init_weights: bool = True  # False: the update does not start at zero

    def share(self, sites: Sequence[Site]) -> Shared:
        return Experts(self, sites)

    def group(self, site: Site) -> tuple[str, tuple[int, int]]:
        """Layers of one group share their experts: those of a target name and shape."""
        wanted = self.target_modules
        if isinstance(wanted, str):
            return wanted, site.shape
        names = [name for name in sorted(wanted or ()) if site.path.endswith(name)]
        return max(names, key=len, default=site.name.rpartition(".")[2]), site.shape


class Experts(Shared):
    """A (r, in) for each stretch of layers, B (experts x r, out) for each group; PEFT's file has
    them at every layer.
    """

    def __init__(self, config: LilyConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.where: dict[tuple[str, str], tuple[int, int]] = {}  # path, parameter: which A and B
        self.zero: list[bool] = []  # whether a B starts at zero
        groups: dict[Any, list[Site]] = {}
        for site in sites:
            own = config.at(site.path, site.parameter)
            kind = (own.r, own.num_B, own.stride_A, own.init_weights)  # overrides may change it
            groups.setdefault((config.group(site), kind), []).append(site)
        for number, (((_, (out, in_)), kind), members) in enumerate(groups.items()):
            r, experts, stride, zero = kind
            self.B.append(nn.Parameter(torch.empty(experts * r, out)))
            self.zero.append(zero)
            for i, site in enumerate(members):
                if i % stride == 0:
                    self.A.append(nn.Parameter(torch.empty(r, in_)))
                self.where[site.path, site.parameter] = (len(self.A) - 1, number)

    def start(self) -> None:
        for p in self.parameters():
            nn.init.kaiming_uniform_(p, a=5**0.5)
        for p, zero in zip(self.B, self.zero, strict=True):
            if zero:
                p.zero_()

    def file_tensors(self) -> dict[str, Tensor]:
        return {}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        """Nothing: the layers take the values."""


class Lily(Adapter, config=LilyConfig):
    """The router R (experts, r) of one layer; A and B are shared."""

    together = True
    FORBIDS = {"merge": "its mixture of experts depends on the input, so no weight does the same"}

    def __init__(self, config: LilyConfig, site: Site, shared: Experts) -> None:
        super().__init__(config, site, shared)
        self.R = nn.Parameter(torch.empty(config.num_B, config.r))
        self.place = shared.where[site.path, site.parameter]
        self.scale, self.r = config.scaling, config.r

    def start(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.R, a=5**0.5)

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        a, b = self.shared.A[self.place[0]], self.shared.B[self.place[1]]
        site = layer.site
        h = site.reduce(x, a)  # (rows, ..., r), or (rows, groups x r, ...) at a convolution
        seen = (h.movedim(1, -1) if site.ones else h).reshape(-1, self.r)
        p = (seen @ self.R.mT).softmax(-1).mean(0)  # (experts,)
        mixed = torch.einsum("e,ero->or", p, b.reshape(len(p), self.r, -1))
        return layer(x) + self.scale * site.expand(h, mixed)

    def file_tensors(self) -> dict[str, Tensor]:
        a, b = self.shared.A[self.place[0]], self.shared.B[self.place[1]]
        return {"lily_A.weight": a, "lily_B.weight": b, "lily_router.weight": self.R}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        for key, mine in self.file_tensors().items():
            if key in tensors:
                mine.copy_(tensors[key])

    def delta_norm(self, w: Tensor) -> float:
        a, b = self.shared.A[self.place[0]], self.shared.B[self.place[1]]
        mean = b.reshape(-1, self.r, b.shape[1]).mean(0)
        return float(self.scale * (mean.mT @ a).norm())
