"""Tied weights under merging: ends that agree stay one tensor, ends that differ are untied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .host import Host
from .switch import Switch
from .tree import inside, walk


def commit(
    model: nn.Module,
    names: tuple[str, ...],
    prepared: Iterable[tuple[Host, dict[str, Tensor]]],
    keep: bool | str,
    switch: Switch,
) -> None:
    """Put merged weights in place; the model's config is told where a tie came loose."""
    before = _groups(model)
    seen: dict[tuple[int, str], Tensor] = {}
    for host, new in prepared:
        for key, value in new.items():
            old = host.pristine(key)
            mark = (id(old) if old.is_meta else old.data_ptr(), str(tuple(old.shape)))
            twin = seen.setdefault(mark, value)
            if twin is not value and (value.is_meta or torch.equal(twin, value)):
                new[key] = twin
        host.commit(names, new, keep)
    loose = [group for group in before if len({id(_weight(module)) for module in group}) > 1]
    config = getattr(model, "config", None)
    if loose and getattr(config, "tie_word_embeddings", False):
        if keep and switch.tied is None:
            switch.tied = {"tie_word_embeddings": True, **_tied_keys(model)}
        config.tie_word_embeddings = False  # type: ignore[union-attr]  # else saving or loading would tie them again
        for key, value in _tied_keys(model).items():
            setattr(model, key, type(value)())


def restore(model: nn.Module, switch: Switch) -> None:
    """The config as it was before merging."""
    if switch.tied is not None:
        saved = dict(switch.tied)
        model.config.tie_word_embeddings = saved.pop("tie_word_embeddings")  # type: ignore[union-attr]
        for key, value in saved.items():
            setattr(model, key, value)
        switch.tied = None


def _tied_keys(model: nn.Module) -> dict[str, Any]:
    """transformers' list of tied weights, on the instance."""
    return (
        {"all_tied_weights_keys": model.all_tied_weights_keys}
        if hasattr(model, "all_tied_weights_keys")
        else {}
    )


def _weight(module: nn.Module) -> Tensor:
    return inside(module)._parameters["weight"]  # type: ignore[return-value]


def _groups(model: nn.Module) -> list[list[nn.Module]]:
    """The modules whose weights are one tensor now."""
    found: dict[int, dict[int, nn.Module]] = {}
    for _, module in walk(model):
        if inside(module)._parameters.get("weight") is not None:
            found.setdefault(id(_weight(module)), {})[id(inside(module))] = module
    return [list(group.values()) for group in found.values() if len(group) > 1]
