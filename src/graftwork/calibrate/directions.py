"""The leading directions of data that come in batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inits.drawn import seeded


class Directions:
    """The k leading right singular vectors of all rows so far, less their mean (incremental PCA,
    Ross et al. 2008).

    The singular vectors of one more batch are those of [S V'; the batch less its mean; a row for
    the change of the mean].
    """

    v: Tensor  # (k, in), rows of unit length
    s: Tensor  # (k,)
    mean: Tensor  # (in,)
    share: Tensor  # (k,) of the variance that each direction explains

    def __init__(self, k: int, tau: float) -> None:
        self.k, self.tau, self.seen = k, tau, 0
        self.scatter: Tensor | float = 0.0  # (in,) squared distances from the mean
        self.converged = torch.zeros(k, dtype=torch.bool)  # which directions stay where they are

    def add(self, x: Tensor) -> None:
        """Take in a batch x (n, in); one with fewer rows than directions says nothing."""
        n = len(x)
        if n < self.k:
            return
        x, mean = x.float(), x.double().mean(0)
        total, rows = self.seen + n, x - mean.float()
        scatter = (x.double() - mean).square().sum(0)
        if self.seen:
            shift = mean - self.mean
            scatter += shift.square() * self.seen * n / total
            change = (self.seen * n / total) ** 0.5 * shift  # fp64: so are later directions
            rows = torch.cat([self.s[:, None] * self.v, rows, -change[None]])
            mean = self.mean + shift * n / total
        with seeded(42, x.device):  # PEFT's
            _, s, v = torch.svd_lowrank(rows, q=2 * self.k, niter=4)
        v = v.mT[: self.k]
        v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()  # a sign that batches share
        if self.seen:
            self.converged = (F.cosine_similarity(v, self.v) >= self.tau).cpu()
        self.scatter = self.scatter + scatter
        self.v, self.s, self.mean, self.seen = v, s[: self.k], mean, total
        self.share = self.s**2 / self.scatter.sum()
