"""WaveFT (arXiv 2505.12532): W + s IDWT2(S), S zero but for n trained wavelet coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Shared, Site
from ..errors import warn
from ..fields import check_choice, whole
from ..inits.drawn import positions
from .sparse import Sparse
from .wavelets import FAMILIES, filters, inverse


@dataclass
class WaveFTConfig(TargetConfig, method="WAVEFT", peft="exclude fan bias save layers"):
    """Some coefficients of the update's wavelet transform."""

    n_frequency: int = whole(2592)  # how many coefficients train
    scaling: float = 25.0  # s
    wavelet_family: str = "db1"  # db1-38, sym2-20, coif1-17; others than db1 need PyWavelets
    use_idwt: bool = True  # False: W + s S
    random_loc_seed: int | None = 777  # which they are: drawn from this seed, and in no file
    n_frequency_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: n there}
    proportional_parameters: bool = False  # n_frequency is the mean; a layer's n goes by its size
    init_weights: bool = True  # False: not zero at the start

    PATTERNS = {"n_frequency_pattern": "n_frequency"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.wavelet_family, "wavelet_family", FAMILIES)
        if self.wavelet_family == "coif4" and self.use_idwt:
            warn(
                "PEFT 0.21's filter for 'coif4' is no coiflet: an adapter that was trained with "
                "PEFT gives other answers here, and the other way round; 'coif3' is the same"
            )

    def share(self, sites: Sequence[Site]) -> Shared | None:
        return Budget(self.n_frequency, sites) if self.proportional_parameters else None


class Budget(Shared):
    """How many coefficients a layer has, by its part of all weights."""

    def __init__(self, mean: int, sites: Sequence[Site]) -> None:
        super().__init__()
        count = [math.prod(site.lead) for site in sites]
        self.sum = mean * sum(count)
        self.weights = sum(n * math.prod(s.shape) for n, s in zip(count, sites, strict=True))

    def at(self, site: Site) -> int:
        """That of one matrix of a site."""
        return max(1, round(math.prod(site.shape) / self.weights * self.sum))


class WaveFT(Sparse, config=WaveFTConfig):
    """v (n,), the entries of S: four subbands, padded by what the inverse transform cuts off."""

    keys = {"v": "waveft_spectrum"}
    drawn = ("at",)

    def __init__(self, config: WaveFTConfig, site: Site, shared: Budget | None = None) -> None:
        n = shared.at(site) if shared else config.n_frequency
        super().__init__(config, site, n, f"n_frequency={config.n_frequency}")
        (out, in_), self.shape = site.shape, site.shape
        at = positions(config.random_loc_seed, out * in_, n)
        f = filters(config.wavelet_family) if config.use_idwt else None
        if f is not None:
            self.grid = rows, cols = tuple(k + f.shape[1] - 2 + k % 2 for k in site.shape)
            i, j = at // in_ + (rows - out) // 2, at % in_ + (cols - in_) // 2
            y, x = rows // 2, cols // 2  # PEFT's file has the two mixed subbands exchanged
            at = (i % y + j // x * y) * cols + j % x + i // y * x
        self.at = nn.Buffer(at, persistent=False)
        self.f = None if f is None else nn.Buffer(f, persistent=False)  # (2, taps)
        self.scale, self.zero = config.scaling, config.init_weights

    def start(self, site: Site) -> None:
        self.v.zero_() if self.zero else self.v.normal_(std=0.01)

    def delta(self) -> Tensor:
        s, (out, in_) = self.dense(), self.shape
        if self.f is not None:
            s = inverse(inverse(s, self.f).mT, self.f).mT[:out, :in_]
        return self.scale * s
