"""``add_weighted_adapter``: several adapters, of whatever methods, as one LoRA.

What is combined are the updates. ``linear([x, x], [0.5, 0.5])`` is x, which PEFT's rule, adding the
factors, doubles; that rule is there as ``compat="peft"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inject import inject
from ..engine.switch import Switch
from ..errors import StateError, did_you_mean
from ..hooks import UPDATES
from . import rules
from .factored import Factored, joined
from .peft_rules import as_peft
from .sites import MATRIX, Place, Updates, insert, updates_of
from .whole import NOTHING, TOKENS, asked, gathered, give

SUFFIX = "_svd"
TYPES = ("linear", "cat", "svd", *(n for n in rules.RULES if n != "linear"))


def combine(
    model: nn.Module,
    switch: Switch,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    sign: str = "total",
    compat: str | None = None,
) -> dict[str, float]:
    """Add an adapter that combines others; see ``PeftModel.add_weighted_adapter``.

    Returns:
        The share of each update that a smaller rank leaves out, by the place's name.

    Raises:
        StateError: the request makes no sense, or an adapter cannot be written as an update.
    """
    _check(switch, adapters, weights, name)
    if switch.configs[adapters[0]].COMBINES != UPDATES:
        if (rank, energy, density) != (None, None, None):
            raise StateError(f"svd_rank, energy and density are about {UPDATES}; leave them out")
        return _joined(model, switch, adapters, weights, name, how)
    dense, how = how.endswith(SUFFIX), _known(how, density)
    found = _found(model, switch, adapters)
    if compat == "peft":
        insert(model, switch, name, as_peft(found, weights, how, dense, density, sign, rank), found)
        return {}
    if how == "svd" and rank is None and energy is None:
        rank = max(u.rank for one in found for u in one.places.values())
    made: dict[Place, Factored] = {}
    lost: dict[str, float] = {}
    for place in dict.fromkeys(place for one in found for place in one.places):
        parts = [(one.places.get(place), w) for one, w in zip(found, weights, strict=True)]
        whole = _one(parts, how, density or 1.0, sign)
        small = whole if how == "cat" else whole.compressed(rank, energy)
        made[place] = small
        size = 0.0 if small is whole else float(whole.norm())
        lost[place.name] = _lost(whole, small) / size if size else 0.0
    saved = _saved(found, weights, how, density or 1.0, sign)
    insert(model, switch, name, made, found, saved)
    return lost


def _check(switch: Switch, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    switch.check(tuple(adapters))
    if name in switch.configs:
        raise StateError(f"there is an adapter {name!r} already; choose another name")
    if not adapters or len(adapters) != len(weights):
        raise StateError(f"give a weight for each of {len(adapters)} adapters, not {len(weights)}")
    if bad := [w for w in weights if not math.isfinite(w)]:
        raise StateError(
            f"a weight is a finite number, not {bad[0]}; give one for each of the adapters"
        )
    kinds = {switch.configs[n].COMBINES: n for n in adapters}
    if len(kinds) > 1:
        each = ", ".join(f"{n!r} of {kind}" for kind, n in kinds.items())
        raise StateError(
            f"adapters that consist of different things cannot be one: {each}. Make them active "
            f"together instead: set_adapter({list(adapters)})"
        )


def _known(how: str, density: float | None) -> str:
    plain = how.removesuffix(SUFFIX)
    if plain not in TYPES:
        raise StateError(
            f"combination_type={how!r} is not known{did_you_mean(how, TYPES)}; it is one of "
            f"{list(TYPES)}"
        )
    if plain in rules.RULES and plain != "linear" and not (density and 0 < density <= 1):
        raise StateError(f"{how} keeps a share of the numbers: give density, above 0 and at most 1")
    return plain


def _joined(
    model: nn.Module,
    switch: Switch,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: str,
) -> dict[str, float]:
    """Adapters that are no updates, as one of their own kind."""
    configs: list[Any] = [switch.configs[n] for n in adapters]
    with torch.no_grad():
        held = [(n, switch.shared.get(n)) for n in adapters]
        config, tensors = configs[0].combined(held, weights, how)
    found = _found(model, switch, adapters, own=False)
    saved = _saved(found, weights, how, 1.0, "total")
    if how == "cat" and (twice := [k for k in saved if sum(k in one.whole for one in found) > 1]):
        raise StateError(
            f"{list(adapters)} train {twice[0][0]} as a whole, of which only one can act: use "
            "'linear', which adds up the changes of both"
        )
    biases = {one.bias for one in configs} - {"none"}
    bias = "all" if "all" in biases else next(iter(biases), "none")
    config = replace(config, bias=bias, **asked(saved))
    inject(model, config, name, switch, start=False)
    with torch.no_grad():
        switch.shared[name].take(tensors, switch.configs[name])
    give(model, name, saved)
    return {}


def _found(
    model: nn.Module, switch: Switch, adapters: Sequence[str], own: bool = True
) -> list[Updates]:
    every = [updates_of(model, switch, n, "weighted", own=own) for n in adapters]
    _check_ends(adapters, every)
    whole = gathered(model, [one.whole for one in every])
    return [replace(one, whole=mine) for one, mine in zip(every, whole, strict=True)]


def _check_ends(adapters: Sequence[str], every: Sequence[Updates]) -> None:
    """Stop where one adapter acts at both ends of a tied weight and another at one of them: a LoRA
    ties all that it has there, or nothing. Rows of tokens are always tied, beneath a LoRA at the
    other end.
    """
    ends = {pair for one in every for pair in one.ends}
    for first, last in sorted(ends):
        kinds = {kind for one in every for kind in one.ends.get((first, last), ())}
        tokens = {t for one in every for t in one.whole.get((first, TOKENS), NOTHING).tensors}
        for name, one in zip(adapters, every, strict=True):
            own = one.whole.get((first, TOKENS), NOTHING).tensors.keys()
            alone = one.acts(first) - one.ends.get((first, last), set())
            far = one.acts(last)
            if kinds == {TOKENS}:
                far.discard(MATRIX)
                if tokens <= own:  # which hide what is beneath
                    alone.discard(MATRIX)
            if alone or far:
                others = zip(adapters, every, strict=True)
                also = (n for n, o in others if n != name and (first, last) in o.ends)
                tied = next(also, name)  # one adapter may do both, in two of its parts
                raise StateError(
                    f"{name!r} changes {first if alone else last} alone, and {tied!r} also the "
                    f"other end of the tied weight, {last if alone else first}: one adapter "
                    f"cannot do both. Make them active together instead: "
                    f"set_adapter({list(adapters)}), or train all with ensure_weight_tying=True"
                )


def _one(
    parts: list[tuple[Factored | None, float]], how: str, density: float, sign: str
) -> Factored:
    """The combination at one place; an adapter that is not there changes nothing there."""
    present = [(u, w) for u, w in parts if u is not None]
    if how in ("linear", "cat", "svd"):
        return joined([u * w for u, w in present])
    weights = torch.tensor([w for _, w in present], dtype=present[0][0].a.dtype)
    basis, c = rules.coordinates([(u.a, u.b) for u, _ in present])
    mixed = rules.RULES[how](c, weights.to(c), density, sign)
    biases = [u.bias for u, _ in present if u.bias is not None]
    bias = None
    if biases:
        zero = torch.zeros_like(biases[0])
        every = torch.stack([zero if u.bias is None else u.bias for u, _ in present])
        bias = rules.RULES[how](every, weights.to(every), density, sign)
    return Factored(mixed, basis, bias)


def _lost(whole: Factored, small: Factored) -> float:
    """||whole - small||, by the directions that are left out."""
    return float(joined([whole, small * -1.0]).norm())


def _saved(
    found: Sequence[Updates], weights: Sequence[float], how: str, density: float, sign: str
) -> dict[Any, dict[str, Tensor]]:
    """What is trained as a whole, combined as changes of the base's own tensors."""
    rule = rules.RULES[how if how in rules.RULES else "linear"]
    made: dict[Any, dict[str, Tensor]] = {}
    for key in dict.fromkeys(key for one in found for key in one.whole):
        have = [one.whole.get(key) for one in found]
        base = {n: value for one in have if one is not None for n, value in one.base.items()}
        made[key] = {}
        for name, value in base.items():
            zero = torch.zeros_like(value)
            values = [zero if o is None else o.tensors.get(name, value) - value for o in have]
            changes = torch.stack(values)
            change = rule(changes, torch.tensor(weights).to(changes), density, sign)
            made[key][name] = value + change
    return made
