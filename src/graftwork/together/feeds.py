"""Where runs get their batches: one that several runs read is read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from .runs import Run


class Feed:
    """Batches of one source, over and over; readers are at places of their own.

    Args:
        source: gives an iterable for each pass.
        device: where the tensors go.
        whose: what it is, for errors.
    """

    def __init__(self, source: Callable[[], Any], device: torch.device, whose: str) -> None:
        self.source, self.device, self.whose = source, device, whose
        self.held: deque[dict[str, Any]] = deque()
        self.first = 0  # the number of the oldest batch that is held
        self.passing: Iterator[Any] = iter(())

    def get(self, number: int) -> dict[str, Any]:
        """The batch of this number, counted over all passes."""
        while self.first + len(self.held) <= number:
            self.held.append(self._next())
        return self.held[number - self.first]

    def forget(self, number: int) -> None:
        """Drop the batches before this one, which nobody reads again."""
        while self.held and self.first < number:
            self.held.popleft()
            self.first += 1

    def _next(self) -> dict[str, Any]:
        batch = next(self.passing, None)
        if batch is None:
            self.passing = iter(self.source())
            batch = next(self.passing, None)
        if batch is None:
            raise TrainingError(
                f"{self.whose} gave no batch in pass over it: it must be readable again for each "
                "pass, as a list or a DataLoader is; for a generator give the function that makes "
                "it, which is called with the run"
            )
        return moved(batch, self.device, self.whose)


def moved(batch: Any, device: torch.device, whose: str) -> dict[str, Any]:
    """A batch on the device, checked to be one."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{whose} gave a {type(batch).__name__}; a batch is a dictionary from the names of the "
            'model\'s arguments to tensors, such as {"input_ids": ..., "labels": ...}. For pairs '
            'give [{"x": x, "labels": y} for x, y in pairs]'
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def source_of(data: Any, run: Run, whose: str) -> Callable[[], Any]:
    """What gives an iterable for each pass: data are one, or a function from a run to one.

    Raises:
        TypeError: they are something else.
    """
    if callable(data) and not hasattr(data, "__iter__"):
        return lambda: data(run)
    if not hasattr(data, "__iter__") or hasattr(data, "__next__"):
        raise TypeError(
            f"{whose} is a {type(data).__name__}, which cannot be read again for each pass; give a "
            "list of batches, a DataLoader, or a function from a Run to one of those"
        )
    return lambda: data


def length_of(data: Any, run: Run) -> int:
    """How many batches one pass has.

    Raises:
        ValueError: the data do not tell.
    """
    one = data(run) if callable(data) and not hasattr(data, "__iter__") else data
    if not hasattr(one, "__len__"):
        raise ValueError(
            f"run {run.name!r} has no steps=, and its data do not tell how many batches they have; "
            "give Run(steps=...)"
        )
    return len(one)
