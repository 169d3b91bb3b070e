"""EVA's survey of the layers' inputs: their directions, and which layers get how many of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from ..calibrate.directions import Directions
from ..calibrate.rows import Data
from ..errors import TrainingError

PASSES = 100  # over the data, after which directions that still turn will not settle


class Survey:
    """The directions that layers have and get, from ``ranks`` to ``most``; those with equal inputs,
    and so equal ``marks``, are looked at once.
    """

    def __init__(
        self, ranks: Mapping[str, int], most: Mapping[str, int], marks: Mapping[str, Hashable],
        tau: float,
    ) -> None:  # fmt: skip
        groups: dict[Hashable, list[str]] = {}
        for path, of_inputs in marks.items():
            groups.setdefault(of_inputs, []).append(path)
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

    def distribute(self) -> None:
        """Give the ranks to the directions with the largest shares."""
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


def surveyed(data: Data, rho: float, tau: float) -> Survey:
    """The survey of the data, gone through until the directions have settled."""
    ranks = {path: data.config.at(path).r for path in data.layers}
    most = {p: min(round(r * rho), data.layers[p].shape[1]) for p, r in ranks.items()}
    survey = Survey(ranks, most, _marks(data), tau)
    for _ in range(PASSES):
        for batch in data:
            if not (turning := survey.turning()):
                return survey
            data.run(batch, turning, lambda path, x: survey.first[path].add(x))
            if not survey.unseen():
                survey.distribute()
        if unseen := survey.unseen():
            raise ValueError(
                f"no batch has as many rows as {unseen[0]} may get directions "
                f"({survey.first[unseen[0]].k}, its rank times rho); give larger batches, or a "
                "smaller r or rho"
            )
    raise TrainingError(
        f"after {PASSES} passes over the data the directions of {survey.turning()[0]} still turn; "
        "give more data, or a smaller tau"
    )


def _marks(data: Data) -> dict[str, Hashable]:
    """Some sums over the first batch's input of each layer: they differ unless it is the same."""
    marks: dict[str, Hashable] = dict.fromkeys(data.layers)

    def see(path: str, x: Tensor) -> None:
        x = x.double()
        ramp = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
        sums = x.sum(), x.square().sum(), (x @ ramp).square().sum()
        marks[path] = (len(x), *map(float, sums))

    first = next(iter(data), None)
    if first is None:
        raise ValueError("the dataloader is empty; EVA needs data")
    data.run(first, data.layers, see)
    if missed := [path for path, found in marks.items() if found is None]:
        raise ValueError(f"{missed[0]} is not called by forward_fn; leave it out of target_modules")
    return marks
