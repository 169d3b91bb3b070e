"""Rows of a mixed batch: whose they are, and how to take them apart and join them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError


def count(*trees: Any) -> int | None:
    """The length of the first axis of the first tensor with one."""
    for tree in trees:
        if isinstance(tree, Tensor):
            if tree.ndim:
                return tree.shape[0]
        elif isinstance(tree, Mapping) or isinstance(tree, (tuple, list)):
            found = count(*(tree.values() if isinstance(tree, Mapping) else tree))
            if found is not None:
                return found
    return None


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
            f"{path} was called with {n} inputs for a batch of {len(rows)} adapter_names, so it "
            "is not known which input "
            "belongs to which row (expert layers receive a subset of the tokens); run the rows "
            "one adapter at a time"
        )
    return tuple(name for name in rows for _ in range(n // len(rows)))


def take(tree: Any, index: Tensor, n: int) -> Any:
    """The rows ``index`` of every tensor in ``tree`` that has ``n`` rows."""
    if isinstance(tree, Tensor):
        return tree[index] if tree.ndim and tree.shape[0] == n else tree
    if isinstance(tree, Mapping):
        return {key: take(value, index, n) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(take(value, index, n) for value in tree)
    return tree


def join(parts: list[Any], order: Tensor) -> Any:
    """Outputs of groups of rows as one output, its rows in ``order``."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[order]
    if isinstance(first, Mapping):
        joined = {key: join([part[key] for part in parts], order) for key in first}
        return type(first)(**joined)
    if isinstance(first, (tuple, list)):
        return type(first)(join(list(column), order) for column in zip(*parts, strict=True))
    if all(part is None for part in parts):
        return None
    raise StateError(
        f"a mixed batch cannot join outputs of type {type(first).__name__}; run one adapter at a "
        "time"
    )
