"""Rows of a mixed batch: whose they are, and how to take them apart and join them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import StateError


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in a model's inputs or outputs: nested tuples, lists and mappings of them."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def expand(rows: tuple[str, ...], n: int, path: str) -> tuple[str, ...]:
    """One name for each of ``n`` inputs: beams, tokens and windows of a row stand next to each
    other.

    Raises:
        StateError: ``n`` is no multiple of the number of rows, so the rows cannot be told apart.
    """
    if n == len(rows):
        return rows
    if n % len(rows) or "experts" in path.split(".")[:-1]:
        raise StateError(
            f"{path} was called with {n} inputs for a batch of {len(rows)} adapter_names, so it is "
            "not known which input belongs to which row (expert layers receive a subset of the "
            "tokens); run the rows one adapter at a time"
        )
    return tuple(name for name in rows for _ in range(n // len(rows)))


def each(context: Mapping[str, Any], key: str, n: int, path: str) -> Any:
    """A value of a call for each of ``n`` inputs; beams of a row stand next to each other.

    Raises:
        StateError: the call gave none, or not one for each row.
    """
    value = context.get(key)
    if value is None:
        raise StateError(f"{path} needs {key}, one for each row: model(..., {key}=...)")
    if n % len(value):
        raise StateError(f"{key} has {len(value)} entries for {n} rows; give one for each row")
    return value if len(value) == n else value.repeat_interleave(n // len(value), 0)


def take(tree: Any, index: Tensor, n: int) -> Any:
    """The rows ``index`` of every tensor in ``tree`` that has ``n`` rows."""

    def of(leaf: Any) -> Any:
        return leaf[index] if isinstance(leaf, Tensor) and leaf.shape[:1] == (n,) else leaf

    return pytree.tree_map(of, tree)


def join(parts: list[Any], order: Tensor) -> Any:
    """Outputs of groups of rows as one output, its rows in ``order``."""

    def of(*leaves: Any) -> Any:
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            return torch.cat(leaves)[order]
        if all(leaf is None for leaf in leaves):
            return None
        kind = type(leaves[0]).__name__
        raise StateError(
            f"a mixed batch cannot join outputs of type {kind}; run one adapter at a time"
        )

    return pytree.tree_map(of, *parts)
