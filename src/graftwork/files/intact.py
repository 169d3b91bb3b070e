"""Adapters that are as they were where what changes them breaks off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inject import switch_of
from ..engine.tree import hosts


@contextmanager
def intact(model: nn.Module, name: str, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within the block an adapter may change; where an exception leaves it, everything is as it
    was, bit for bit: its parts, those that derive something from them, its config and its schedule.

    Args:
        model: the user's model.
        name: the adapter.
        tensors: others of the model that may change.
    """
    switch: Any = switch_of(model)
    names = {name, *switch.flags.reading}
    parts = [p for h in hosts(model).values() for n in names for _, p in h.parts_of(n)]
    kept = (switch.configs, switch.schedules, switch.shared)
    config, schedule, shared = (found.get(name) for found in kept)
    objects = [one for one in (config, schedule) if one is not None]
    with undone([*parts, *([] if shared is None else [shared])], tensors, objects):
        yield


@contextmanager
def undone(
    parts: Iterable[nn.Module], tensors: Iterable[Tensor] = (), objects: Iterable[Any] = ()
) -> Iterator[None]:
    """Within the block modules, tensors, and attributes of objects may change; where an exception
    leaves it, they are as before.
    """
    modules = list({id(m): m for part in parts for m in part.modules()}.values())
    every = [*tensors, *(t for m in modules for t in _tensors(m))]
    values = [(t, t.data, _once(t.detach()).clone()) for t in {id(t): t for t in every}.values()]
    facts = [(vars(one), _copied(vars(one))) for one in [*modules, *objects]]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for own, before in facts:
                _restore(own, before)
            for tensor, place, value in values:
                tensor.data = place
                _once(place).copy_(value)
        raise


def _tensors(module: nn.Module) -> list[Tensor]:
    """All of a module's own, whether registered or not."""
    held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


def _once(tensor: Tensor) -> Tensor:
    """An expanded tensor without what it repeats."""
    return tensor[tuple(slice(None if step else 1) for step in tensor.stride())]


def _copied(facts: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Attributes, and what is in those that are changed in place."""
    return {
        key: (value, value.copy() if isinstance(value, (dict, set, list)) else None)
        for key, value in facts.items()
    }


def _restore(facts: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    facts.clear()
    for key, (value, inner) in before.items():
        if inner is not None:
            value.clear()
            value.extend(inner) if isinstance(value, list) else value.update(inner)
        facts[key] = value
