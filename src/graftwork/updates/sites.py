"""The updates of one adapter, place by place; and an adapter made of updates: a LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.adapter import Adapter
from ..engine.host import Host, LayerHost
from ..engine.inject import inject
from ..engine.module import PARAM, part_key
from ..engine.site import Embedding, Site, kind_of
from ..engine.switch import Switch
from ..engine.ties import Tied
from ..engine.tree import hosts, inside, walk
from ..errors import StateError
from ..fast.shards import in_parts, parts_in
from ..fast.tensors import no_autocast, steady
from ..methods.lora import LoRA
from ..methods.lora_config import LoraConfig
from ..parts.tokens import Tokens
from .factored import Factored, of_dense
from .whole import COPY, TOKENS, Trained, asked, give, trained_of

MATRIX = "matrix"
PADDING = 1.25  # ranks are made equal by zeros where that costs no more than this factor


@dataclass(frozen=True)
class Place:
    """A matrix of the model: a layer's own weight, or a parameter of another module."""

    path: str
    parameter: str

    @property
    def name(self) -> str:
        """Its full name."""
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"


@dataclass
class Updates:
    """One adapter as updates.

    Args:
        config: its config.
        places: the matrices that it changes.
        scales: the factor inside B of a LoRA.
        whole: what it trains as a whole, by path and key.
        tied: whether it acts at both ends of a tied weight, and its config has to say so.
        ends: which of what it does at a path it does at another too, the tied end.
    """

    config: Any
    places: dict[Place, Factored] = field(default_factory=dict)
    scales: dict[Place, float] = field(default_factory=dict)
    whole: dict[tuple[str, str], Trained] = field(default_factory=dict)
    tied: bool = False
    ends: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def acts(self, path: str) -> set[str]:
        """The ways in which it changes a layer: ``matrix``, ``copy``, ``trainable_tokens``."""
        whole = {key for at, key in self.whole if at == path and key in (COPY, TOKENS)}
        return whole | {MATRIX for place in self.places if place.path == path}


@torch.no_grad()
def updates_of(
    model: nn.Module,
    switch: Switch,
    name: str,
    purpose: str,
    rank: int | None = None,
    energy: float | None = None,
    own: bool = True,
) -> Updates:
    """An adapter as updates, exact; of a smaller rank where the update is dense and one is given;
    without ``own`` only what it trains as a whole.

    Raises:
        StateError: an update cannot be written as a matrix; the text says why.
    """
    found = Updates(switch.configs[name])
    sources = {
        id(p): (path, key) for path, h in hosts(model).items() for key, p in h.parts_of(name)
    }
    for path, host in hosts(model).items():
        beside = [part for _, part in host.parts_of(name)]
        for key, part in host.parts_of(name):
            if how := parts_in([host.base_layer, part]):
                raise in_parts(path, how, "combined or converted")
            if isinstance(part, Tied):
                found.tied |= part.saved
                source, key = sources[id(part.source[0])]
                own_kind = _own(found.config, host, key)
                kind = MATRIX if own_kind or key not in (COPY, TOKENS) else key
                found.ends.setdefault((source, path), set()).add(kind)
                continue  # the first end has the tensors
            own_kind = _own(found.config, host, key)
            if not own_kind and (trained := trained_of(host, key, part)) is not None:
                found.whole[path, key if part.instead() is None else "copy"] = trained
                continue
            if not own:
                continue
            if reason := part.FORBIDS.get(purpose) or part.FORBIDS.get("merge"):
                raise StateError(f"{name!r} is no update of a weight at {path}: {reason}")
            site = host.need_site(key)
            place = Place(path, site.parameter)
            with no_autocast(host.base_layer), steady([part]):
                update = _seen(_update(part, site, rank, energy), part, beside)
            # of no rank is what AdaLoRA has pruned: an update of zeros like any other
            found.places[place] = update.padded(1) if update.rank == 0 else update
            found.scales[place] = float(part.scale)
    return found


def _own(config: Any, host: Host, key: str) -> bool:
    """Whether a part is the method's own at a matrix, and not what comes along beside it."""
    site = host.site_of(key)
    if site is None:
        return False
    return key == config.method.lower() or (key.startswith(PARAM) and site.raw.ndim > 1)


def _seen(update: Factored, part: Adapter, beside: Sequence[Any]) -> Factored:
    """What of an update is not in the rows of tokens that its adapter trains above it."""
    for other in beside:
        if isinstance(other, Tokens) and other is not part:
            a, b = update.a.clone(), update.b.clone()
            if other.columns:
                a[..., other.indices] = 0
            else:
                b[other.indices] = 0
            update = replace(update, a=a, b=b)
    return update


def _update(part: Adapter, site: Site, rank: int | None, energy: float | None) -> Factored:
    part = part.precise()
    if isinstance(part, Tokens):
        rows = part.change(site.weight.to(part.dtype))
        chosen = F.one_hot(part.indices, site.shape[1 if part.columns else 0]).to(rows)
        return Factored(chosen, rows.mT) if part.columns else Factored(rows, chosen.mT)
    if (exact := part.factored()) is not None:
        a, b, bias = (None if t is None else t.detach() for t in exact)
        assert a is not None and b is not None
        return Factored(a, b, bias)
    w, b = site.weight.to(part.dtype), site.bias
    b = None if b is None else b.to(part.dtype)
    new, bias = part.fold(w, b)
    update = of_dense(new - w, rank, energy)
    change = bias if b is None or bias is None else bias - b
    changed = change is not None and bool(change.abs().max() > 0)
    return Factored(update.a, update.b, change if changed else None)


def insert(
    model: nn.Module,
    switch: Switch,
    name: str,
    places: Mapping[Place, Factored],
    found: Sequence[Updates],
    saved: Mapping[tuple[str, str], Mapping[str, Tensor]] | None = None,
) -> None:
    """Add a LoRA with these updates; it is not active.

    Args:
        model: the user's model.
        switch: its switch.
        name: the new adapter's name.
        places: the update of each matrix.
        found: the adapters that it comes from; the first gives what is no mathematics, such as
            the task.
        saved: values of what is trained as a whole; those of the first that has them by default.
    """
    values = saved if saved is not None else {
        key: one.whole[key].tensors for one in reversed(found) for key in one.whole
    }  # fmt: skip
    places, values = _absorbed(model, places, values)
    places = _levelled(places)
    if not places:
        raise StateError("there is no LoRA in it: no matrix of a layer that LoRA knows is trained")
    config = _config(model, places, values, found)
    inject(model, config, name, switch, start=False)
    with torch.no_grad():
        for path, host in hosts(model).items():
            for key, part in host.parts_of(name):
                if isinstance(part, LoRA):
                    site = host.need_site(key)
                    _fill(part, site, places[Place(path, site.parameter)])
            host.set_requires_grad(name, False)
    give(model, name, values)


def _absorbed(
    model: nn.Module,
    places: Mapping[Place, Factored],
    values: Mapping[tuple[str, str], Mapping[str, Tensor]],
) -> tuple[dict[Place, Factored], dict[tuple[str, str], dict[str, Tensor]]]:
    """Updates that values trained as a whole would hide become part of these: all of an update
    where the layer is copied, and the rows of tokens that are trained.
    """
    left, new, every = dict(places), {k: dict(v) for k, v in values.items()}, hosts(model)
    for place, update in places.items():
        copied, rows = (new.get((place.path, key)) for key in ("copy", "trainable_tokens"))
        if copied is None and rows is None:
            continue
        host, change = every[place.path], update.b @ update.a
        site = host.need_site("" if isinstance(host, LayerHost) else part_key(place.parameter))
        if copied is not None:
            del left[place]
            copied[place.parameter] = copied[place.parameter] + site.from_matrix(change)
        if copied is not None and update.bias is not None:
            if "bias" not in copied:
                raise StateError(
                    f"the update of {place.path} has a bias and the layer has none, so what "
                    "another of these adapters trains in its place cannot hold it: leave one out"
                )
            copied["bias"] = copied["bias"] + update.bias
        for token in rows or ():
            own = change[..., int(token)] if isinstance(site, Embedding) else change[int(token)]
            rows[token] = rows[token] + own  # type: ignore[index]
    return left, new


def _levelled(places: Mapping[Place, Factored]) -> dict[Place, Factored]:
    """The same updates, all of one rank where zeros cost little."""
    top = max((u.rank for u in places.values()), default=1)
    size = {p: u.a.shape[-1] + u.b.shape[-2] for p, u in places.items()}
    exact = sum(size[p] * u.rank for p, u in places.items())
    needless = any(top > min(u.a.shape[-1], u.b.shape[-2]) for u in places.values())
    if needless or sum(size.values()) * top > PADDING * exact:
        return dict(places)
    return {p: u.padded(top) for p, u in places.items()}


def _exactly(model: nn.Module, paths: set[str]) -> set[str] | str:
    """A target that means these paths; a name also means what ends with it."""
    others = [path for path, _ in walk(model) if path not in paths]
    if any(other.endswith(f".{path}") for path in paths for other in others):
        return "|".join(re.escape(path) for path in sorted(paths))
    return paths


def _config(
    model: nn.Module,
    places: Mapping[Place, Factored],
    saved: Mapping[tuple[str, str], Any],
    found: Sequence[Updates],
) -> LoraConfig:
    configs = [one.config for one in found]
    first, ranks = configs[0], [u.rank for u in places.values()]
    r = max(set(ranks), key=ranks.count) if ranks else 1
    others = {re.escape(p.name): u.rank for p, u in places.items() if u.rank != r}
    biases = {config.bias for config in configs} - {"none"}
    shifts = any(u.bias is not None for u in places.values())
    layers = {path: kind_of(inside(module)) for path, module in walk(model)}
    bare = [p.path for p in places if layers[p.path] is Embedding] if shifts else []
    return LoraConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_exactly(model, {p.path for p in places if p.parameter == "weight"}),
        target_parameters=[p.name for p in places if p.parameter != "weight"] or None,
        lora_bias=shifts,
        overrides={re.escape(path): {"lora_bias": False} for path in bare},
        **asked(saved),
        bias=("all" if "all" in biases else "lora_only") if biases else "none",
        ensure_weight_tying=any(one.tied for one in found),
        layer_replication=getattr(first, "layer_replication", None),
    )


def _alive(update: Factored) -> Tensor:
    """A with LoRA's start in the directions of zeros: where both factors are 0, nothing trains."""
    dead = (update.a == 0).all(-1) & (update.b == 0).all(-2)
    bound = update.a.shape[-1] ** -0.5  # as kaiming_uniform_(a=sqrt(5))
    drawn = torch.rand(update.a.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(dead[..., None], ((2 * drawn - 1) * bound).to(update.a), update.a)


def _fill(part: LoRA, site: Site, update: Factored) -> None:
    a, b = site.from_factors(_alive(update), update.b / part.scale)
    part.A.copy_(a)
    part.B.copy_(b)
    if part.bias is not None:
        part.bias.zero_() if update.bias is None else part.bias.copy_(update.bias / part.scale)
