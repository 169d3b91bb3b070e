"""SHiRA (arXiv 2406.13175): W + S, S zero but for r (in + out) trained entries, as in a LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Site
from ..fields import whole
from ..inits.drawn import positions
from .sparse import Sparse


@dataclass
class ShiraConfig(TargetConfig, method="SHIRA", peft="fan save"):
    """Some entries of the weight train.

    A choice of your own: ``config.mask_fn = f``, where ``f(layer, r)`` gives a mask of the shape of
    ``layer.weight`` with r (in + out) ones.
    """

    r: int = whole(32)  # r (in + out) entries train; no rank
    mask_type: str = "random"  # another word: mask_fn chooses
    random_seed: int | None = None  # of the random choice
    init_weights: bool = True  # False: not zero at the start

    mask_fn: ClassVar[Any] = None

    def at(self, path: str, parameter: str = "weight") -> ShiraConfig:
        new = super().at(path, parameter)
        new.mask_fn = self.mask_fn  # type: ignore[misc]
        return new

    def choose(self, site: Site, n: int) -> Tensor:
        """The n entries that train, row by row."""
        if self.mask_fn is not None:
            seed = {} if self.random_seed is None else {"random_seed": self.random_seed}
            mask = site.to_matrix(self.mask_fn(site.layer, self.r, **seed))
            found: Tensor = mask.flatten().nonzero().flatten()
            if mask.shape != site.shape or len(found) != n:
                raise ValueError(
                    f"mask_fn gives {len(found)} ones in {tuple(mask.shape)} for {site.path} "
                    f"{site.describe()}; it must give r (in + out) = {n} in {site.shape}"
                )
            return found
        if self.mask_type != "random":
            raise ValueError(
                f"mask_type={self.mask_type!r} is not known here: set config.mask_fn to a function "
                "of (layer, r) that gives the mask, or use mask_type='random'"
            )
        return positions(self.random_seed, math.prod(site.shape), n).sort()[0]


class SHiRA(Sparse, config=ShiraConfig):
    """v (n,) at rows and columns (2, n), which are in the file."""

    keys = {"v": "shira_weight", "index": "shira_indices"}

    def __init__(self, config: ShiraConfig, site: Site, shared: None = None) -> None:
        n = config.r * sum(site.shape)
        super().__init__(config, site, n, f"r={config.r}")
        self.index = nn.Buffer(torch.zeros(2, n, dtype=torch.int32))
        self.config = config

    def start(self, site: Site) -> None:
        at, in_ = self.config.choose(site, len(self.v)), site.shape[1]
        self.index.copy_(torch.stack([at // in_, at % in_]))
        self.v.zero_() if self.config.init_weights else self.v.normal_()

    def places(self) -> Tensor:
        row, column = self.index.long()
        at: Tensor = row * self.grid[1] + column
        return at

    def delta(self) -> Tensor:
        return self.dense()
