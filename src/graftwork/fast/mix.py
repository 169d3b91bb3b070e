"""A mixed batch at one layer: the layer once for all rows, and around it what its adapters add.

What a part of an adapter says of itself is enough: ``products()``, A (r, in), B (out, r) and a
shift (out,) or None, where it adds B A dropped(x) + shift; ``gains()``, of the inputs (in,) and of
the outputs (out,), either may be None, where it only multiplies by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import chunks, grouped, learned
from . import stack as stacked
from .grouped import Rows
from .learned import Leaves, Lying
from .many import many
from .plan import Own
from .watch import Kept, Watch, numel

LARGER = 2  # factors that are computed from far fewer numbers are not kept: VeRA's, UniLoRA's


@dataclass
class Level:
    """At most one low-rank part of each adapter.

    Args:
        parts: the number of the adapter, and its part.
        drop: the dropout of each adapter; empty where nothing is dropped.
        own: some dropouts only their parts know, so that they are asked one by one.
    """

    parts: list[tuple[int, Any]]
    drop: list[float]
    own: bool


@dataclass
class Mix:
    """What happens to the rows at one layer.

    Args:
        levels: low-rank parts, the lowest first.
        scaling: for each adapter its parts that scale.
        lasts: what follows from the tensors is the same in the next call.
        large: the factors are not to be kept.
        stacks: what was kept.
        leaves: what was kept of factors that learn, which are in it as they are.
    """

    levels: list[Level]
    scaling: list[list[Any]]
    lasts: bool
    large: bool = False
    stacks: Stacks | None = None
    leaves: Stacks | None = None


@dataclass
class Stacks:
    """The tensors of all adapters, put together.

    Args:
        terms: of each level, for ``Rows.plan`` and ``Rows.sorted``.
        factors: of each level, for ``chunks.add``; while adapters learn, for ``learned.add``.
        shifts: of each level, (adapters, out) or None.
        gains: of the inputs and of the outputs, (adapters, d) or None.
    """

    terms: list[tuple[tuple[int, int], ...]]
    factors: list[list[tuple[Tensor, Tensor]] | Leaves]
    shifts: list[Tensor | None]
    gains: tuple[Tensor | None, Tensor | None]


def closed(parts: Sequence[Any]) -> list[Any] | None:
    """The answers of the parts of one adapter at a layer; None where one has none, or where those
    that add and those that scale come together.
    """
    if any(part.skip or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    added = [part.products() for part in parts]
    if None not in added:
        return added
    scaled = [part.gains() for part in parts]
    return None if None in scaled else scaled


def plan(parts: Sequence[Sequence[Any]]) -> Mix | None:
    """The plan for one layer; None where an adapter needs more than products and gains.

    Args:
        parts: for each adapter its parts at the layer, the lowest first.
    """
    levels: list[Level] = []
    scaling: list[list[Any]] = [[] for _ in parts]
    for k, own in enumerate(parts):
        told = closed(own)
        if told is None:
            return None
        if told and len(told[0]) == 2:
            scaling[k] = list(own)
            continue
        for depth, part in enumerate(own):
            if depth == len(levels):
                levels.append(Level([], [0.0] * len(parts), False))
            _append(levels[depth], k, part)
    for level in levels:
        level.drop = level.drop if any(level.drop) else []
    training = any(part.training for own in parts for part in own)
    return Mix(levels, scaling, lasts=not (training and torch.is_grad_enabled()))


def _append(level: Level, k: int, part: Any) -> None:
    level.parts.append((k, part))
    dropout = getattr(part, "dropout", None)
    if type(dropout) is nn.Dropout:
        level.drop[k] = float(dropout.p) if dropout.training else 0.0
    elif dropout is not None:
        level.own = level.own or type(dropout) is not nn.Identity


def find(
    kept: Kept,
    rows: Rows,
    holder: dict[str, Any],
    parts_of: Callable[[str], Sequence[Any]],
    dtype: torch.dtype,
) -> tuple[Mix, Stacks] | None:
    """The plan for one layer and its tensors, kept where none needs a gradient.

    Args:
        kept: what was kept at the layer.
        rows: whose the rows are.
        holder: where the adapters of the layer are found by name.
        parts_of: name -> the parts of that adapter at the layer, the lowest first.
        dtype: that of the products.
    """
    if torch.compiler.is_compiling():  # a compiled program does not watch versions
        mix = plan([parts_of(name) for name in rows.names])
        return None if mix is None else (mix, stack(mix, rows, dtype, keep=False))
    graded = torch.is_grad_enabled()
    key = rows.key, graded, dtype
    found = kept.find(key)
    watch, mix = found or _planned(kept, key, rows, holder, parts_of)
    if mix is None:
        return None
    if graded and watch.learns():
        made = mix.leaves or stack(mix, rows, dtype, False, kept.stacks)
        mix.leaves = made if _lies(made) else None
        return mix, made
    if not (mix.lasts and watch.usable) or mix.large:
        return mix, stack(mix, rows, dtype, keep=False)
    if mix.stacks is None or not watch.unwritten():
        if found is not None:
            _, mix = _planned(kept, key, rows, holder, parts_of)
            assert mix is not None
        stacks = stack(mix, rows, dtype, keep=True)
        mix.large = _size(stacks) > LARGER * numel(
            p for level in mix.levels for _, p in level.parts
        )
        mix.stacks = None if mix.large else stacks
        return mix, stacks
    return mix, mix.stacks


def layer(
    kept: Kept,
    rows: Rows,
    holder: dict[str, Any],
    parts_of: Callable[[str], Sequence[Any]],
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    own: Callable[[], Own],
) -> Tensor | None:
    """The output of a layer for all rows; None where an adapter needs more than that.

    Args:
        kept: what was kept at the layer.
        rows: whose the rows are.
        holder: where the adapters of the layer are found by name.
        parts_of: name -> the parts of that adapter at the layer, the lowest first.
        x: the input (rows, ..., in).
        base: the base layer's output in ``dtype``, a tensor of its own that may be written to.
        dtype: that of the output, in which the products are computed.
        own: how the base layer computes its product, where that can be done here.
    """
    found = find(kept, rows, holder, parts_of, dtype)
    if found is None:
        return None
    alike = _alike(*found, rows) if x.numel() else None
    if alike is not None and (mine := own()).w is not None:
        return many(x, mine.w, mine.bias, *alike)
    return run(*found, rows, x, base, dtype)


def _alike(mix: Mix, stacks: Stacks, rows: Rows) -> tuple[Tensor, Tensor, float] | None:
    """B', A and a scale for ``many``; None where the adapters need more than that."""
    if stacks is not mix.leaves or len(mix.levels) > 1 or not stacks.factors:
        return None
    level, lying, groups = mix.levels[0], stacks.factors[0], rows.plan(stacks.terms[0])
    assert isinstance(lying, Lying)
    if level.drop or level.own or len(groups) > 1 or not groups[0].whole:
        return None
    k = lying.scales[0]
    (stack,) = lying.stacks
    return (stack.up, stack.down, k) if lying.scales.count(k) == len(lying.scales) else None


def _planned(
    kept: Kept,
    key: Any,
    rows: Rows,
    holder: dict[str, Any],
    parts_of: Callable[[str], Sequence[Any]],
) -> tuple[Watch, Mix | None]:
    parts = [parts_of(name) for name in rows.names]
    watch = Watch()
    for name in rows.names:
        watch.value(holder, name)
        if name in holder:
            watch.module(holder[name])
    for part in (part for own in parts for part in own):
        if part.shared is not None:
            watch.module(part.shared)
    mix = plan(parts)
    kept.put(key, watch, mix)
    return watch, mix


def _size(stacks: Stacks) -> int:
    """How many numbers the factors have."""
    found = 0
    for terms, level in zip(stacks.terms, stacks.factors, strict=True):
        if level and not isinstance(level, Leaves):
            down, up = level[0]
            found += sum(rank for _, rank in terms) * (down.shape[1] + up.shape[2])
    return found


def _lies(stacks: Stacks) -> bool:
    """Whether nothing was computed, so that what is written to the tensors is in it too."""
    extra = [*stacks.shifts, *stacks.gains]
    return all(type(level) is Lying for level in stacks.factors) and extra.count(None) == len(extra)


def stack(
    mix: Mix, rows: Rows, dtype: torch.dtype, keep: bool, lying: stacked.Stacks | None = None
) -> Stacks:
    """The tensors of all adapters as they are now, in ``dtype``.

    Args:
        mix: the plan.
        rows: whose the rows are.
        dtype: that of the products.
        keep: they are used many times.
        lying: where factors that learn may lie.
    """
    made = Stacks([], [], [], (_gains(mix, 0, dtype), _gains(mix, 1, dtype)))
    learning = torch.is_grad_enabled() and not (keep or torch.compiler.is_compiling())
    for level in mix.levels:
        found = [_told(part, learning) for _, part in level.parts]
        a, b, shifts, scales = zip(*found, strict=True)
        numbers = [k for k, _ in level.parts]
        terms = tuple(zip(numbers, (own.shape[0] for own in a), strict=True))
        made.terms.append(terms)
        made.factors.append(
            learned.leaves(a, b, scales, dtype, rows.plan(terms), lying)
            if learning
            else chunks.stacks(rows.sorted(terms), a, b, dtype, keep)
        )
        given = {k: shift for k, shift in zip(numbers, shifts, strict=True) if shift is not None}
        made.shifts.append(_table(given, len(mix.scaling), 0.0, dtype))
    return made


def _told(part: Any, learning: bool) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """A, B, a shift and a scale of B, which has it in it where nothing learns."""
    apart = part.unscaled() if learning else None
    if apart is None:
        return *part.products(), 1.0
    a, b, scale, shift = apart
    return a, b, shift, scale


def _gains(mix: Mix, side: int, dtype: torch.dtype) -> Tensor | None:
    given: dict[int, Tensor] = {}
    for k, parts in enumerate(mix.scaling):
        for part in parts:
            gain = part.gains()[side]
            if gain is not None:
                given[k] = given[k] * gain if k in given else gain
    return _table(given, len(mix.scaling), 1.0, dtype)


def _table(given: dict[int, Tensor], n: int, rest: float, dtype: torch.dtype) -> Tensor | None:
    """A vector for each of n adapters, (n, d); None where none has one."""
    if not given:
        return None
    default = torch.full_like(next(iter(given.values())), rest)
    return torch.stack([given.get(k, default) for k in range(n)]).to(dtype)


def run(
    mix: Mix,
    stacks: Stacks,
    rows: Rows,
    x: Tensor,
    layer: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The output of all rows, in ``dtype``.

    Args:
        mix: the plan.
        stacks: its tensors.
        rows: whose the rows are.
        x: the input (rows, ..., in).
        layer: computes the base layer's output in ``dtype``, as a tensor of its own.
        dtype: in which the products are computed, too.
    """
    free = not torch.is_grad_enabled()
    y = _scaled(layer(_scaled(x, stacks.gains[0], rows)), stacks.gains[1], rows)
    if not mix.levels:
        return y
    shape = y.shape
    flat, x = y.reshape(shape[0], -1, shape[-1]), x.reshape(shape[0], -1, x.shape[-1])
    for i, level in enumerate(mix.levels):
        taken = _dropped(rows, level, x)
        taken = taken if taken.dtype == dtype else taken.to(dtype)
        terms, factors = stacks.terms[i], stacks.factors[i]
        if isinstance(factors, Leaves):
            flat = learned.add(flat, taken, rows.plan(terms), factors)
        else:
            flat = chunks.add(flat, taken, rows.sorted(terms), factors, free)
        if (shifts := stacks.shifts[i]) is not None:
            each = grouped.by_row(shifts, rows.owner(x.device))
            flat = flat.add_(each) if free else flat + each
    return flat.view(shape)


def _scaled(x: Tensor, gains: Tensor | None, rows: Rows) -> Tensor:
    """x (rows, ..., d) times the gains of its rows."""
    if gains is None:
        return x
    each = gains.index_select(0, rows.owner(x.device)).to(x.dtype)
    return x * each.view(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])


def _dropped(rows: Rows, level: Level, x: Tensor) -> Tensor:
    """The input of a level's products, (rows, tokens, in)."""
    if not level.own:
        return grouped.dropout(x, level.drop, rows.owner(x.device)) if level.drop else x
    parts, order, taken = dict(level.parts), [], []
    for k, where in enumerate(rows.where):
        own = x.index_select(0, torch.tensor(where, device=x.device))
        taken.append(parts[k].dropped(own) if k in parts else own)
        order += where
    return torch.cat(taken).index_select(0, torch.tensor(order, device=x.device).argsort())
