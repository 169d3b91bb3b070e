"""The leading directions of data that come in batches, and which layers get how many of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawn import seeded


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


class Survey:
    """The directions of the inputs of each layer; layers with equal inputs are looked at once.

    Args:
        ranks: the rank of each layer without EVA.
        widths: the number of each layer's inputs.
        marks: one for each layer, equal for equal inputs.
        rho: how many times its rank a layer may get.
        tau: the cosine above which a direction has converged.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        widths: Mapping[str, int],
        marks: Mapping[str, Hashable],
        rho: float,
        tau: float,
    ) -> None:
        groups: dict[Hashable, list[str]] = {}
        for path, mark in marks.items():
            groups.setdefault(mark, []).append(path)
        most = {p: min(round(r * rho), widths[p]) for p, r in ranks.items()}
        self.budget = sum(ranks.values())
        self.first = {g[0]: Directions(max(most[p] for p in g), tau) for g in groups.values()}
        self.like = {p: g[0] for g in groups.values() for p in g[1:]}  # layer -> its equal
        self.shown = {p: p for p in self.first} | self.like  # layer -> whose directions it has
        self.ranks = {p: self.first[q].k for p, q in self.shown.items()}  # enough, at the beginning

    def turning(self) -> list[str]:
        """The layers among whose directions some still turn, of those that get a rank."""
        return [p for p, d in self.first.items() if not d.converged[: self.ranks[p]].all()]

    def unseen(self) -> list[str]:
        """The layers of which no batch has had enough rows."""
        return [p for p, d in self.first.items() if not d.seen]

    def add(self, path: str, x: Tensor) -> None:
        """Take in a layer's inputs (n, in)."""
        self.first[path].add(x)

    def distribute(self) -> None:
        """Give the ranks to the directions with the largest shares."""
        if self.unseen():
            return
        shares = {p: self.first[q].share for p, q in self.shown.items()}
        owners = [p for p, share in shares.items() for _ in share]
        order = torch.cat(list(shares.values())).argsort(descending=True)[: self.budget]
        counts = Counter(owners[i] for i in order.tolist())
        self.ranks = {p: counts[p] for p in self.shown}
        for p, q in self.like.items():  # whose directions are watched has the highest rank
            self.ranks[q], self.ranks[p] = sorted((self.ranks[p], self.ranks[q]), reverse=True)

    def factors(self, whiten: bool) -> dict[str, Tensor]:
        """A (rank, in) of each layer."""
        found = {}
        for path, r in self.ranks.items():
            d = self.first[self.shown[path]]
            found[path] = d.v[:r] / d.s[:r, None].sqrt() if whiten else d.v[:r].clone()
        return found
