"""FourierFT (arXiv 2405.03003): W + s Re IFFT2(S), S zero but for n trained entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Site
from ..fields import whole
from ..inits.drawn import positions
from .c3a import wide
from .sparse import Sparse


@dataclass
class FourierFTConfig(TargetConfig, method="FOURIERFT", peft="exclude fan bias save layers"):
    """Some coefficients of the update's Fourier transform."""

    n_frequency: int = whole(1000)  # how many coefficients train
    scaling: float = 150.0  # s
    random_loc_seed: int | None = 777  # which they are: drawn from this seed, and in no file
    n_frequency_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: n there}
    init_weights: bool = False  # True: zero; False: normal, so the start is not the base

    PATTERNS = {"n_frequency_pattern": "n_frequency"}


class FourierFT(Sparse, config=FourierFTConfig):
    """v (n,), the entries of the spectrum S (out, in)."""

    keys = {"v": "fourierft_spectrum"}
    drawn = ("at",)

    def __init__(self, config: FourierFTConfig, site: Site, shared: None = None) -> None:
        n = config.n_frequency
        super().__init__(config, site, n, f"n_frequency={n}")
        at = positions(config.random_loc_seed, math.prod(site.shape), n)
        self.at = nn.Buffer(at, persistent=False)
        self.scale, self.zero = config.scaling, config.init_weights

    def start(self, site: Site) -> None:
        self.v.zero_() if self.zero else self.v.normal_()

    def delta(self) -> Tensor:
        update: Tensor = torch.fft.ifft2(wide(self.dense())).real.to(self.v)
        return self.scale * update
