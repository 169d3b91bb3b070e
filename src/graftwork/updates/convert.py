"""To LoRA: from an adapter of any method, from a LoRA of another rank, from a fine-tuned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.site import Standing, kind_of
from ..engine.switch import Switch
from ..errors import StateError
from ..fields import check_probability, check_rank
from ..targets.offer import Offer
from .factored import Factored, joined, of_dense
from .sites import Place, insert, updates_of


@dataclass(frozen=True)
class Conversion:
    """What a conversion kept.

    Args:
        errors: place -> ``||D - B A|| / ||D||``, what the rank leaves out of the update D.
        ranks: place -> the rank there.
    """

    errors: dict[str, float]
    ranks: dict[str, int]

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        size = sum(self.ranks.values()) / max(1, len(self.ranks))
        where = max(self.errors, key=lambda n: self.errors[n], default="-")
        return (
            f"{len(self.ranks)} places, mean rank {size:.1f}; relative error at most "
            f"{self.worst:.2e} (at {where})"
        )


def check_size(rank: int | float | None, energy: float | None) -> tuple[int | None, float | None]:
    """A rank, or a share of the energy, which PEFT also takes as a rank below one."""
    if isinstance(rank, float) and not rank.is_integer():
        rank, energy = None, rank
    if rank is not None:
        check_rank(int(rank) if isinstance(rank, float) else rank, "rank")
    if energy is not None and energy != 1:
        check_probability(energy, "energy")
    return (None if rank is None else int(rank)), energy


def to_lora(
    model: nn.Module,
    switch: Switch,
    adapter: str,
    name: str,
    rank: int | float | None = None,
    energy: float | None = None,
) -> Conversion:
    """Add a LoRA that does what an adapter of any method does; see ``PeftModel.to_lora``."""
    switch.check((adapter,))
    if name in switch.configs:
        raise StateError(f"there is an adapter {name!r} already; choose another name")
    rank, energy = check_size(rank, energy)
    found = updates_of(model, switch, adapter, "to_lora")
    small = {place: u.compressed(rank, energy) for place, u in found.places.items()}
    insert(model, switch, name, small, [found])
    return _report({p: (found.places[p], u) for p, u in small.items()})


def _report(pairs: Mapping[Place, tuple[Factored, Factored]]) -> Conversion:
    errors = {}
    for place, (whole, small) in pairs.items():
        size = float(whole.norm())
        rest = float(joined([whole, small * -1.0]).norm())
        errors[place.name] = rest / size if size else 0.0
    return Conversion(errors, {place.name: small.rank for place, (_, small) in pairs.items()})


@torch.no_grad()
def differences(
    base: nn.Module, tuned: nn.Module, rank: int | float | None, energy: float | None
) -> tuple[dict[Place, Factored], dict[str, Tensor], Conversion]:
    """A fine-tuned model minus its base.

    Returns:
        The update of each matrix that changed; the other tensors that changed, by name; and what
        the rank leaves out.

    Raises:
        StateError: the two are not of one shape.
    """
    rank, energy = check_size(rank, energy)
    mine, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    if [(n, p.shape) for n, p in mine.items()] != [(n, p.shape) for n, p in theirs.items()]:
        other = sorted(mine.keys() ^ theirs.keys())[:3] or "shapes"
        raise StateError(f"the models differ in more than the values of their weights: {other}")
    offer = Offer(base)
    updates, pairs, left = {}, {}, {}
    for name, p in mine.items():
        q = theirs[name].to(p.device)
        if torch.equal(p, q.to(p.dtype)):
            continue
        path, _, own = name.rpartition(".")
        kind: Any = kind_of(offer.modules[path]) if own == "weight" and path else None
        if kind is None or not offer.targets(path):
            left[name] = q
            continue
        site = kind(Standing(offer.modules[path], path))
        delta = site.to_matrix(q.float()) - site.to_matrix(p.float())
        place = Place(path, "weight")
        updates[place] = of_dense(delta, rank, energy)
        size = float(delta.norm())
        pairs[place] = float((delta - updates[place].b @ updates[place].a).norm()) / size
    report = Conversion(
        {place.name: error for place, error in pairs.items()},
        {place.name: u.rank for place, u in updates.items()},
    )
    return updates, left, report
