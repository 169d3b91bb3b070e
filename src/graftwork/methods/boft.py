"""BOFT (arXiv 2311.06243): W' = diag(s) W R', R = B_m ... B_1 butterfly factors; each factor turns
blocks of inputs that are twice as far apart as those of the one before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Site
from ..fields import probability, whole
from .rotation import Rotation, cayley, left_out, times_blocks


@dataclass
class BOFTConfig(TargetConfig, method="BOFT", peft="exclude fan bias save layers"):
    """Give ``boft_block_size`` or ``boft_block_num``, the other one 0."""

    boft_block_size: int = 4  # inputs a block
    boft_block_num: int = 0  # number of blocks
    boft_n_butterfly_factor: int = whole(1)  # factors; PEFT without its CUDA extension takes 1
    boft_dropout: float = probability(0.0)  # probability that a block is left out in training
    init_weights: bool = True  # False: not the identity at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        if min(size, number) != 0 or max(size, number) <= 0:
            raise ValueError(
                f"boft_block_num={number} blocks times boft_block_size={size} are a layer's "
                "inputs: give one of the two and set the other to 0"
            )

    def blocks(self, n: int, where: str) -> tuple[int, int]:
        """How many blocks of which size there are at a layer with n inputs."""
        given = self.boft_block_num or self.boft_block_size
        number = self.boft_block_num or n // given
        size, far = n // number if number else 0, 2 ** (self.boft_n_butterfly_factor - 1)
        if n % given or size == 1 or number % far or (far > 1 and size % 2):
            name = "boft_block_num" if self.boft_block_num else "boft_block_size"
            even = f", in blocks of an even size whose number {far} divides" if far > 1 else ""
            fits = [d for d in range(2, n + 1) if n % (d * far) == 0 and (far == 1 or d % 2 == 0)]
            near = min(fits, key=lambda d: abs(d - (size or given)), default=None)
            remedy = "exclude the layer" if near is None else f"try boft_block_size={near}"
            raise ValueError(
                f"{name}={given} does not divide the {n} inputs of {where}{even}; {remedy}"
            )
        return number, size


class BOFT(Rotation, config=BOFTConfig):
    """R (factors, blocks, k, k), of which the skew part counts; s scales the outputs."""

    keys = {"R": "boft_R", "s": "boft_s"}

    def __init__(self, config: BOFTConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        number, k = config.blocks(self.n, f"{site.path} {site.describe()}")
        self.R = nn.Parameter(torch.empty(config.boft_n_butterfly_factor, number, k, k))
        self.s = nn.Parameter(torch.empty((1, site.shape[0]) if site.ones else (site.shape[0], 1)))
        self.random, self.dropout = not config.init_weights, config.boft_dropout

    def start(self, site: Site) -> None:
        nn.init.normal_(self.R, std=0.1) if self.random else nn.init.zeros_(self.R)
        nn.init.normal_(self.s, 1.0, 0.1) if self.random else nn.init.ones_(self.s)

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        r = cayley((self.R - self.R.mT) / 2)
        r = left_out(r, self.dropout) if self.training and self.dropout else r
        factors = list(enumerate(r.mT if back else r))
        for i, factor in factors if back else reversed(factors):
            far, half = 2**i, factor.shape[-1] // 2
            if i:  # halves that are `far` apart come together
                x = torch.unflatten(x, -1, (-1, 2, far, half)).transpose(-3, -2).flatten(-4)
            x = times_blocks(x, factor)
            if i:
                x = torch.unflatten(x, -1, (-1, far, 2, half)).transpose(-3, -2).flatten(-4)
        return x

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, b = super().fold(w, b)
        return self.s.reshape(-1, 1) * w, b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if not (layer.site.pointwise and x.is_floating_point()):
            return Adapter.forward(self, x, layer)
        s, b, y = self.s.flatten(), layer.bias, layer(self.turn(x))
        return s * y if b is None else s * y + (1 - s) * b
