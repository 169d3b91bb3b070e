"""Rows of inputs and outputs of a module, nested as they may be: taken out, and joined again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import StateError


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
