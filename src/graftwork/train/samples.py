"""Encoded samples, and batches of them, padded to their longest."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

IGNORED = -100  # a label that the loss leaves out
POOL = 32  # batches among which samples of like length find each other


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        ids: tokens (length,).
        labels: the class, or a label a token (length,), or None where it is not known.
        types: token types (length,) of a pair of texts.
    """

    ids: np.ndarray
    labels: int | np.ndarray | None
    types: np.ndarray | None = None


class Samples(Dataset[Sample]):
    """A list of samples, as PyTorch's loaders want it."""

    def __init__(self, items: Sequence[Sample]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        return self.items[index]

    def lengths(self) -> list[int]:
        """Tokens in each sample."""
        return [len(item.ids) for item in self.items]


class ByLength(Sampler[int]):
    """A shuffled order in which neighbours have like lengths, so that little is padded.

    It follows from the seed and the epoch alone: a resumed training sees the same order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        shuffled = random.Random(self.seed * 1_000_003 + self.epoch)
        order, size = list(range(len(self.lengths))), self.batch_size
        shuffled.shuffle(order)
        batches = []
        for start in range(0, len(order), size * POOL):
            pool = sorted(order[start : start + size * POOL], key=self.lengths.__getitem__)
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        whole = [batch for batch in batches if len(batch) == size]
        shuffled.shuffle(whole)  # the rest goes last: batches are cut from a flat list
        for batch in [*whole, *(b for b in batches if len(b) < size)]:
            yield from batch


def collate(batch: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Tensors ``input_ids``, ``attention_mask`` (batch, longest) and ``labels``.

    Args:
        batch: the samples.
        pad: the padding token.
    """
    ids = _padded([s.ids for s in batch], pad)
    lengths = torch.tensor([len(s.ids) for s in batch])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    out = {"input_ids": ids, "attention_mask": mask}
    if batch[0].types is not None:
        out["token_type_ids"] = _padded([s.types for s in batch], 0)
    labels: list[Any] = [s.labels for s in batch]
    if labels[0] is not None:
        if isinstance(labels[0], np.ndarray):
            out["labels"] = _padded(labels, IGNORED)
        else:
            out["labels"] = torch.tensor(labels)
    return out


def _padded(rows: Sequence[Any], value: int) -> Tensor:
    out = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return out


def in_batches(
    samples: Samples, size: int, pad: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """All samples in batches of like length, each with the numbers of its samples."""
    order = sorted(range(len(samples)), key=samples.lengths().__getitem__)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, collate([samples[i] for i in chosen], pad)
