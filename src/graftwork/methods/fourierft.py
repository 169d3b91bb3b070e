"""FourierFT (arXiv 2405.03003): W + s Re IFFT2(S), S zero but for n trained entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import PeftType, TargetConfig, beyond, check_rank
from ..engine.adapter import Adapter
from ..engine.site import Site
from ..inits.drawn import positions
from . import defaults
from .c3a import wide
from .sparse import Sparse


@dataclass
class FourierFTConfig(TargetConfig):
    """Some coefficients of the update's Fourier transform."""

    n_frequency: int = 1000  # how many coefficients train
    scaling: float = 150.0  # s
    random_loc_seed: int | None = 777  # which they are: drawn from this seed, and in no file
    n_frequency_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: n there}
    init_weights: bool = False  # True: zero; False: normal, so the start is not the base

    METHOD = PeftType.FOURIERFT
    PATTERNS: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}
    TARGETS = defaults.C_PROJ
    BEYOND = beyond("exclude fan bias save layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.n_frequency, "n_frequency")

    def adapter(self) -> type[Adapter]:
        return FourierFT


class FourierFT(Sparse):
    """v (n,), the entries of the spectrum S (out, in)."""

    keys: ClassVar[dict[str, str]] = {"v": "fourierft_spectrum"}

    def __init__(self, config: FourierFTConfig, site: Site, shared: None = None) -> None:
        n = config.n_frequency
        super().__init__(config, site, n, f"n_frequency={n}")
        at = positions(config.random_loc_seed, math.prod(site.shape), n)
        self.register_buffer("at", at, persistent=False)
        self.scale, self.zero = config.scaling, config.init_weights

    def start(self, site: Site) -> None:
        self.v.zero_() if self.zero else self.v.normal_()

    def delta(self) -> Tensor:
        update: Tensor = torch.fft.ifft2(wide(self.dense())).real.to(self.v)
        return self.scale * update
