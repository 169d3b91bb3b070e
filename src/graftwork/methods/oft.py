"""OFT (arXiv 2306.07280, 2506.19847): W' = W R', R block diagonal, each block I + 2Q + 2Q^2 + ...
of a skew Q, which is nearly orthogonal, or the exact Cayley transform (I - Q) (I + Q)^-1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Site
from ..errors import warn
from ..fields import probability, whole
from .rotation import Rotation, cayley, left_out, neumann, times_blocks


@dataclass
class OFTConfig(TargetConfig, method="OFT", peft="exclude fan bias save layers"):
    """Rotations of blocks of the inputs; either ``r`` or ``oft_block_size``, the other one 0."""

    r: int = 0  # number of blocks
    oft_block_size: int = 32  # inputs a block
    module_dropout: float = probability(0.0)  # probability that a block is left out in training
    init_weights: bool = True  # False: not the identity at the start
    coft: bool = False  # Q stays within a ball around 0
    eps: float = 6e-5  # radius of that ball
    block_share: bool = False  # one rotation for all blocks
    use_cayley_neumann: bool = True  # a sum of powers of Q; False: the exact transform
    num_cayley_neumann_terms: int = whole(5, least=2)  # of that sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.oft_block_size) != 0 or max(self.r, self.oft_block_size) <= 0:
            raise ValueError(
                f"r={self.r} blocks times oft_block_size={self.oft_block_size} are a layer's "
                "inputs: give one of the two and set the other to 0, such as r=0"
            )

    def block_size(self, n: int, where: str) -> int:
        """The block size at a layer: that of the divisor of n that is nearest to what is wished."""
        name, wish = ("r", self.r) if self.r else ("oft_block_size", self.oft_block_size)
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        best = min(divisors, key=lambda d: (abs(d - wish), d))
        size = n // best if self.r else best
        if size == 1:
            raise ValueError(
                f"{name}={wish} makes blocks of one of the {n} numbers of {where}, which rotate "
                f"nothing; try oft_block_size={divisors[min(1, len(divisors) - 1)]}"
            )
        if best != wish:
            warn(f"{name}={wish} does not divide the {n} numbers of {where}; {best} is taken there")
        return size

    def has_schedule(self) -> bool:
        return self.coft

    @torch.no_grad()
    def after_step(self, adapters: Mapping[str, Any], step: int) -> None:
        parts = [part for adapter in adapters.values() for part in adapter.modules()]
        for part in parts if self.coft else ():
            if isinstance(part, OFT):
                part.v.copy_(part.within(part.v))


class OFT(Rotation, config=OFTConfig):
    """v (blocks, k (k - 1) / 2) is the upper triangle of each Q; 0 at the start."""

    keys = {"v": "oft_R.weight"}
    native = True

    def __init__(self, config: OFTConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.k = k = config.block_size(self.n, f"{site.path} {site.describe()}")
        rows, columns = torch.triu_indices(k, k, 1)
        self.upper = nn.Buffer(rows * k + columns, persistent=False)
        blocks = 1 if config.block_share else self.n // k
        self.v = nn.Parameter(torch.empty(blocks, len(self.upper)))
        self.random, self.dropout = not config.init_weights, config.module_dropout
        self.powers = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        self.radius = config.eps / blocks**0.5 if config.coft else math.inf
        if self.outwards:
            self.keys = {"v": "oft_embedding_R.weight"}

    def start(self, site: Site) -> None:
        self.v.normal_(std=0.1) if self.random else self.v.zero_()

    def within(self, v: Tensor) -> Tensor:
        """COFT: the nearest v with ||Q|| <= radius."""
        norm: Tensor = 2**0.5 * torch.linalg.vector_norm(v.detach(), dim=1, keepdim=True)
        inside: Tensor = v.detach() * (self.radius / norm).clamp(max=1)
        return inside

    def rotations(self) -> Tensor:
        """(n / k, k, k)."""
        v = self.v if self.radius == math.inf else self.within(self.v) + self.v - self.v.detach()
        q = v.new_zeros(len(v), self.k**2).index_copy(1, self.upper, v).view(-1, self.k, self.k)
        r = neumann(q - q.mT, self.powers) if self.powers else cayley(q - q.mT)
        r = r.expand(self.n // self.k, -1, -1)
        return left_out(r, self.dropout) if self.training and self.dropout else r

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        r = self.rotations()
        return times_blocks(x, r.mT if back else r)
