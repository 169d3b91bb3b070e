"""The clusters of AdaMSS: how they are found, and which of them train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from ..engine import LowRank, Site
from ..fast.flags import hold
from ..inits.drawn import seeded


def singular(site: Site, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Singular vectors of [W|b], U (outputs, r) and V (r, in, and one for the bias).

    They are drawn as PEFT does, on the weight's device, since the clusters depend on them.
    """
    w = site.weight.float().reshape(-1, site.shape[1])
    if site.bias is not None:
        w = torch.cat([w, site.bias.float()[:, None]], dim=1)
    if w.is_meta:
        raise ValueError(
            f"AdaMSS finds its clusters in the weights, and {site.name} is on the meta device; "
            "load the base model's weights first"
        )
    with seeded(seed, w.device):
        u, _, v = torch.svd_lowrank(w, q=min(r, *w.shape), niter=2)
    return u, v.mT.contiguous()


def clusters(u: Tensor, count: int) -> list[Tensor]:
    """The rows of u in each cluster."""
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "AdaMSS finds its clusters with scikit-learn, which is missing: "
            "pip install scikit-learn"
        ) from error
    means = KMeans(
        n_clusters=min(count, len(u)), init="random", n_init=1, max_iter=10, random_state=123456789
    )
    label = torch.from_numpy(means.fit_predict(u.float().cpu().numpy())).to(u.device)
    return [(label == i).nonzero().flatten() for i in torch.unique(label)]


def directions(u: Tensor, rank: int, least: float) -> Tensor:
    """At most ``rank`` right singular vectors of u, by squared singular values above ``least``."""
    s, v = torch.linalg.svd(u, full_matrices=False)[1:]
    count = max(1, int((s**2 > least * s[0] ** 2).sum()))
    first: Tensor = v[: min(rank, count)].clone()
    return first


class Clustered(LowRank):
    """A method with factors A_i and B_i for each cluster, of which some may stop training."""

    A: nn.ParameterList
    B: nn.ParameterList
    trains: Tensor  # (clusters,)

    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth |p dL/dp|, the importance, and its uncertainty."""
        for name, p in self.named_parameters():
            if p.grad is not None:
                now, zero = (p * p.grad).abs(), torch.zeros_like(p)
                old, spread = (self.seen.get(f"{name}.{key}", zero) for key in ("ipt", "unc"))
                self.seen[f"{name}.unc"] = beta2 * spread + (1 - beta2) * (now - old).abs()
                self.seen[f"{name}.ipt"] = beta1 * old + (1 - beta1) * now

    def scores(self) -> dict[int, float]:
        """How important each cluster is that has been observed."""
        seen, known = self.seen, [i for i in range(len(self.A)) if f"A.{i}.ipt" in self.seen]
        every = {i: [seen[f"{n}.{i}.ipt"] * seen[f"{n}.{i}.unc"] for n in "AB"] for i in known}
        return {i: sum(one.mean().item() for one in both) for i, both in every.items()}

    def rest(self, frozen: bool = True) -> None:
        """Keep the clusters that were stopped from training, and those alone."""
        for i, trains in enumerate(self.trains.tolist()):
            for p in (self.A[i], self.B[i]):
                hold(p, not trains, frozen)

    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_training_state(tensors)
        self.rest(frozen=False)  # for an optimizer that is made now, and holds them all


def stop(parts: Sequence[Clustered], target: int, left: float) -> None:
    """Let only the most important clusters of a model train on: ``target``, and a part of the
    others."""
    budget = int(target + (sum(len(part.A) for part in parts) - target) * left)
    every = [(score, part, i) for part in parts for i, score in part.scores().items()]
    every.sort(key=itemgetter(0), reverse=True)
    for _, part, i in every[budget:]:
        part.trains[i] = False
    for part in parts:
        part.seen = {}
