"""Positions in models whose own code counts them."""

from __future__ import annotations

import threading
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class _Places(threading.local):
    def __init__(self) -> None:
        self.at: dict[int, Tensor] = {}  # table -> the positions that its next call is to give


PLACES = _Places()


def placed(table: Any, args: Any, output: Tensor) -> Tensor | None:
    """A hook behind a table of positions: the rows at those that were counted."""
    positions = PLACES.at.pop(id(table), None)
    if positions is None:
        return None
    return F.embedding(positions + getattr(table, "offset", 0), table.weight)


def tables_of(module: nn.Module) -> list[nn.Module]:
    """The tables of positions in a model, which its own code counts for."""
    every = module.named_modules()
    return [m for n, m in every if n.endswith("embed_positions") and isinstance(m, nn.Embedding)]


def first_of(module: nn.Module) -> int:
    """The position of the first token: RoBERTa's kin count from behind their padding index."""
    tables = [m for n, m in module.named_modules() if n.endswith("position_embeddings")]
    index = getattr(tables[0], "padding_idx", None) if tables else None
    return 0 if index is None else int(index) + 1
