"""Stacked weights for methods that know only one matrix: W'[i] = fold_i(W[i])."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.adapter import Adapter, Shared
from ..engine.site import Site


class Slice(Site):
    """One matrix of a stacked weight, as a site of its own."""

    pointwise = False

    def __init__(self, site: Site, index: tuple[int, ...]) -> None:
        self.whole, self.index, self.shape = site, index, site.shape
        self.parameter, self.host = site.parameter, site.host

    @property
    def name(self) -> str:
        return f"{self.whole.name}[{', '.join(map(str, self.index))}]"

    @property
    def raw(self) -> Tensor:
        return self.whole.raw[self.index]

    @property
    def weight(self) -> Tensor:
        return self.whole.weight[self.index]

    @property
    def bias(self) -> None:
        return None

    def describe(self) -> str:
        return self.whole.describe()


class Stack(Adapter):
    """One adapter for each matrix; a file holds each of their tensors stacked."""

    stacked = True

    def __init__(self, kind: type[Adapter], config: Any, site: Site, shared: Shared | None) -> None:
        super().__init__(config, site, shared)
        self.lead = site.lead
        also = () if shared is None else (shared,)
        every = [kind(config, one, *also) for one in self.slices(site)]
        self.every = nn.ModuleList(every)
        self.replaces, self.FORBIDS = every[0].replaces, every[0].FORBIDS
        self.scale, self.skip = every[0].scale, every[0].skip

    def slices(self, site: Site) -> list[Slice]:
        """The sites of the single matrices."""
        index = torch.cartesian_prod(*map(torch.arange, self.lead)).reshape(-1, len(self.lead))
        return [Slice(site, tuple(row.tolist())) for row in index]

    def start(self, site: Site) -> None:
        for one, slice_ in zip(self.every, self.slices(site), strict=True):
            one.start(slice_)  # type: ignore[operator]

    def derive(self, site: Site) -> None:
        for one, slice_ in zip(self.every, self.slices(site), strict=True):
            one.derive(slice_)  # type: ignore[operator]

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        each = zip(self.every, w.reshape(-1, *w.shape[-2:]), strict=True)
        folded = torch.stack([one.fold(matrix, None)[0] for one, matrix in each])  # type: ignore[operator]
        return folded.reshape(w.shape), b

    def rank(self) -> int | None:
        return self.every[0].rank()  # type: ignore[operator,no-any-return]

    def file_tensors(self) -> dict[str, Tensor]:
        each: list[dict[str, Tensor]] = [one.file_tensors() for one in self.every]  # type: ignore[operator]
        stacked = {key: torch.stack([t[key] for t in each]) for key in each[0]}
        return {key: t.reshape(*self.lead, *t.shape[1:]) for key, t in stacked.items()}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        flat = {key: t.flatten(0, len(self.lead) - 1) for key, t in tensors.items()}
        for i, one in enumerate(self.every):
            one.take({key: t[i] for key, t in flat.items()}, config)  # type: ignore[operator]
