"""Trained values at some entries of a matrix that is zero elsewhere: what sparse methods share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Additive, Site


class Sparse(Additive):
    """v (n,) at n places of a grid, which has the weight's shape where a method changes nothing."""

    grid: tuple[int, ...]
    at: Tensor  # (n,), row by row

    def __init__(self, config: Any, site: Site, n: int, name: str) -> None:
        super().__init__(config, site)
        if n > math.prod(site.shape):
            raise ValueError(
                f"{name} asks for {n} trained entries, and {site.path} {site.describe()} has "
                f"{math.prod(site.shape)}; give it fewer, there alone with overrides"
            )
        self.grid, self.v = site.shape, nn.Parameter(torch.empty(n))

    def places(self) -> Tensor:
        """Where the values stand, (n,), row by row."""
        return self.at.long()

    def dense(self) -> Tensor:
        """The whole grid, (rows, columns)."""
        zero = self.v.new_zeros(math.prod(self.grid))
        return zero.scatter(0, self.places(), self.v).reshape(self.grid)
