"""The user's batches, run through the model, and what layers are given, as rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.site import Site
from ..files.codec import PREFIX
from ..model.functional import user_model
from . import observe
from .options import EvaConfig

Forward = Callable[[nn.Module, Any], Any]
ModelInputs = Callable[[Any, Any], Any]
LayerInputs = Callable[[Any, Any, str], Tensor]
Rows = LayerInputs | Mapping[str, LayerInputs] | None


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a dictionary of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Which positions count, as indices (n, 2): not padding, and not those without a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"the dataloader gives a {type(model_input).__name__}, not a dictionary with "
            "input_ids; give prepare_model_inputs_fn, a function of your own, or None"
        )
    ids, wishes = model_input["input_ids"], EvaConfig.of(peft_config.eva_config)
    mask = model_input.get("attention_mask", torch.ones_like(ids)).bool()
    if wishes.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != wishes.label_mask_value)
    positions: Tensor = mask.nonzero()
    return positions


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """A layer's input at the positions that count, (n, in)."""
    return _first(layer_input, layer_name)[tuple(model_input.mT)]


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = _first(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _first(given: Any, name: str) -> Tensor:
    x = given[0] if isinstance(given, (tuple, list)) and given else given
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is called with a {type(x).__name__}; give prepare_layer_inputs_fn, a function "
            "that makes a tensor (n, in) of it"
        )
    return x


@dataclass
class Data:
    """The user's batches, run through the model, and the rows that layers are given.

    Args:
        model: the model.
        layers: the layers by path.
        loader: the batches.
        config: the adapter's config.
        forward: calls the model with a batch.
        prepare: (batch, config) -> what the next function is given.
        rows: makes rows of a layer's input.
        gather: whether those of all processes are collected.
    """

    model: nn.Module
    layers: Mapping[str, Site]
    loader: Iterable[Any]
    config: Any
    forward: Forward
    prepare: ModelInputs | None
    rows: Rows
    gather: bool

    def __post_init__(self) -> None:
        wrapped = user_model(self.model) is not self.model
        self.names = {p: PREFIX + p if wrapped else p for p in self.layers}  # as PEFT's modules
        given = self.rows
        if not isinstance(given, Mapping):
            self.rows_of = dict.fromkeys(self.layers, given or _all_rows)
            return
        if unknown := set(given) - {*self.names, *self.names.values()}:
            raise ValueError(
                f"prepare_layer_inputs_fn names {sorted(unknown)[0]}, which is none of the layers: "
                f"{sorted(self.names.values())[:4]} ..."
            )
        self.rows_of = {p: given.get(n, given.get(p, _all_rows)) for p, n in self.names.items()}

    def __iter__(self) -> Iterator[Any]:
        device = next(self.model.parameters()).device
        for batch in self.loader:
            yield moved(batch, device)

    def run(self, batch: Any, paths: Iterable[str], see: Callable[[str, Tensor], Any]) -> None:
        """Call ``see`` with the rows of each of these layers while a batch is run."""
        hint = self.prepare(batch, self.config) if self.prepare else batch

        def called(path: str, given: Any) -> None:
            see(path, everywhere(self.rows_of[path](given, hint, self.names[path]), self.gather))

        with observe.inputs({path: self.layers[path].layer for path in paths}, called):
            self.forward(self.model, batch)

    def marks(self) -> dict[str, Hashable]:
        """A mark for the first batch's input of each layer; equal for equal inputs.

        Raises:
            ValueError: there is no batch, or a layer is not called.
        """
        marks: dict[str, Hashable] = {}
        for batch in self:
            self.run(batch, self.layers, lambda path, x: marks.update({path: mark(x)}))
            break
        else:
            raise ValueError("the dataloader is empty; EVA needs data")
        if missed := [path for path in self.layers if path not in marks]:
            raise ValueError(
                f"{missed[0]} is not called by forward_fn; leave it out of target_modules"
            )
        return {path: marks[path] for path in self.layers}


def mark(x: Tensor) -> Hashable:
    """Some sums over x (n, in): they differ unless x is the same."""
    x = x.double()
    ramp = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return len(x), float(x.sum()), float(x.square().sum()), float((x @ ramp).square().sum())


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(batch, Tensor) or not isinstance(batch, (Mapping, tuple, list)):
        return batch.to(device) if hasattr(batch, "to") else batch
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    return type(batch)(moved(value, device) for value in batch)


def everywhere(x: Tensor, gather: bool) -> Tensor:
    """The rows of all processes."""
    import torch.distributed as dist

    if not gather or not dist.is_available() or not dist.is_initialized():
        return x
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, x.cpu())
    return torch.cat(every).to(x.device)
