"""The user's batches, and the rows that layers are given while one is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engine.site import Site
from ..files.codec import PREFIX
from ..model.functional import user_model
from .run import inputs

Forward = Callable[[nn.Module, Any], Any]
Hint = Callable[[Any, Any], Any]
RowsOf = Callable[[Any, Any, str], Tensor]
Rows = RowsOf | Mapping[str, RowsOf] | None


@dataclass
class Data:
    """The user's batches, and how rows of a layer's input are made of one."""

    model: nn.Module
    layers: Mapping[str, Site]
    loader: Iterable[Any]
    config: Any
    forward: Forward  # calls the model with a batch
    hint: Hint | None  # (batch, config) -> what the next one is given; None: the batch
    rows: Rows  # (a layer's input, that, its name) -> (n, in); None: all rows
    gather: bool  # whether the rows of all processes are collected

    def __post_init__(self) -> None:
        wrapped = user_model(self.model) is not self.model
        self.names = {p: PREFIX + p if wrapped else p for p in self.layers}  # as PEFT's modules
        given = self.rows
        if not isinstance(given, Mapping):
            given = dict.fromkeys(self.layers, given or all_rows)
        if unknown := set(given) - {*self.names, *self.names.values()}:
            raise ValueError(
                f"prepare_layer_inputs_fn names {sorted(unknown)[0]}, which is none of the layers: "
                f"{sorted(self.names.values())[:4]} ..."
            )
        self.rows_of = {p: given.get(n, given.get(p, all_rows)) for p, n in self.names.items()}

    def __iter__(self) -> Iterator[Any]:
        device = next(self.model.parameters()).device
        return (moved(batch, device) for batch in self.loader)

    def run(self, batch: Any, paths: Iterable[str], see: Callable[[str, Tensor], Any]) -> None:
        """Call ``see`` with the rows of each of these layers while a batch is run."""
        hint = self.hint(batch, self.config) if self.hint else batch

        def called(path: str, given: Any) -> None:
            x = self.rows_of[path](given, hint, self.names[path])
            see(path, gathered(x) if self.gather else x)

        layers = {path: self.layers[path] for path in paths}
        inputs(self.model, layers, lambda: self.forward(self.model, batch), called)


def all_rows(layer_input: Any, hint: Any, name: str) -> Tensor:
    """A layer's input as rows (n, in)."""
    x = first(layer_input, name)
    return x.reshape(-1, x.shape[-1])


def first(given: Any, name: str) -> Tensor:
    """The tensor among a layer's arguments."""
    x = given[0] if isinstance(given, (tuple, list)) and given else given
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is called with a {type(x).__name__}; give prepare_layer_inputs_fn, a function "
            "that makes a tensor (n, in) of it"
        )
    return x


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes."""
    if not dist.is_available() or not dist.is_initialized():
        return x
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, x.cpu())
    return torch.cat(every).to(x.device)
