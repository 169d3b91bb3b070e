"""Batches of several runs as one: rows below each other, padded to one length, and the outputs
taken apart again as each run alone would have them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import TrainingError
from ..fast.rows import tensors_in

LABELS = ("labels", "start_positions", "end_positions")  # for the loss, not for the model
MASKS = {"attention_mask": 1, "token_type_ids": 0}  # what a batch without them means


@dataclass
class Item:
    """One batch of one run.

    Args:
        name: the run's adapter.
        batch: what the data gave.
        virtual: how many virtual tokens the adapter puts in front of each row.
        alike: whether its rows must not be padded.
        place: the run's number.
    """

    name: str
    batch: dict[str, Any]
    virtual: int = 0
    alike: bool = False
    place: int = 0

    @cached_property
    def rows(self) -> int:
        """How many rows it has."""
        return next((len(t) for t in tensors_in(self.batch) if t.ndim), 0)


class Spec:
    """What a model takes.

    Args:
        model: the user's model.
        context: arguments that adapters read from a call.
        padding: name of an argument -> what its shorter rows are filled up with.
    """

    def __init__(
        self, model: nn.Module, context: Sequence[str], padding: Mapping[str, float] | None
    ) -> None:
        known = inspect.signature(model.forward).parameters
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.names = {n for n, p in known.items() if p.kind not in kinds}
        self.anything = not self.names
        self.context = tuple(context)
        self.model: Any = model
        config = getattr(model, "config", None)
        self.two = bool(getattr(config, "is_encoder_decoder", False))
        pad = getattr(config, "pad_token_id", None)
        pad = pad if isinstance(pad, int) and pad >= 0 else 0
        self.padding: dict[str, float] = {
            "input_ids": pad,
            "decoder_input_ids": pad,
            "labels": -100,
            **dict.fromkeys(("attention_mask", "decoder_attention_mask", "token_type_ids"), 0),
            **dict.fromkeys(("position_ids", "inputs_embeds"), 0),
            **(padding or {}),
        }
        self.fixed = {"use_cache": False} if "use_cache" in self.names else {}

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch is for the model; an encoder-decoder gets what it makes of labels."""
        takes = {
            k: v
            for k, v in batch.items()
            if k not in LABELS and (self.anything or k in self.names or k in self.context)
        }
        labels = batch.get("labels")
        if self.two and labels is not None and "decoder_input_ids" not in takes:
            make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if make is not None and "decoder_inputs_embeds" not in takes:
                takes["decoder_input_ids"] = make(labels=labels)
        return takes


@dataclass
class Joined:
    """Several items as one batch.

    Args:
        items: the items, in the order of their rows.
        inputs: the model's arguments.
        sizes: rows of each item.
        lengths: for each item, length of a padded sequence -> its own.
    """

    items: list[Item]
    inputs: dict[str, Any]
    sizes: list[int]
    lengths: list[dict[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> tuple[str, ...]:
        """The adapter of each row."""
        return tuple(
            item.name for item, n in zip(self.items, self.sizes, strict=True) for _ in range(n)
        )

    @property
    def most(self) -> int:
        """The largest number of virtual tokens."""
        return max(item.virtual for item in self.items)

    def apart(self, outputs: Any) -> Iterator[Any]:
        """The outputs of each item, as it would have them alone."""
        total = sum(self.sizes)
        leaves, spec = pytree.tree_flatten(outputs)
        pieces = [
            torch.split(leaf, self.sizes) if isinstance(leaf, Tensor) and leaf.shape[:1] == (total,)
            else [leaf] * len(self.sizes)
            for leaf in leaves
        ]  # fmt: skip
        for i in range(len(self.items)):
            own = [piece[i] for piece in pieces]
            own = [
                leaf[:, self.own(leaf.shape[1], i)]
                if isinstance(leaf, Tensor) and leaf.ndim == 3
                else leaf
                for leaf in own
            ]
            yield pytree.tree_unflatten(own, spec)

    def own(self, n: int, i: int) -> slice:
        """Which of ``n`` places in a sequence of the batch item ``i`` would have alone."""
        most, virtual = self.most, self.items[i].virtual
        for padded, length in self.lengths[i].items():
            if n == padded + most:
                return slice(most - virtual, n - (padded - length))
            if n == padded:
                return slice(0, length)
        return slice(0, n)


def join(items: Sequence[Item], spec: Spec) -> Joined:
    """Rows of all items below each other.

    Raises:
        TrainingError: they do not fit.
    """
    taken = [spec.inputs(item.batch) for item in items]
    sizes = [item.rows for item in items]
    _fill_in(taken, items, spec)
    joined = Joined(list(items), dict(spec.fixed), sizes, [{} for _ in items])
    for key in taken[0]:
        values = [one[key] for one in taken]
        if all(isinstance(v, Tensor) and v.ndim for v in values):
            joined.inputs[key] = _cat(key, values, joined, spec)
        elif all(isinstance(v, list) and len(v) == n for v, n in zip(values, sizes, strict=True)):
            joined.inputs[key] = [one for value in values for one in value]
        elif all(v is values[0] or _same(v, values[0]) for v in values):
            joined.inputs[key] = values[0]
        else:
            raise TrainingError(
                f"the batches of {[i.name for i in items]} give {key} other values, and one pass "
                "has one for all its rows; give it as a tensor with an entry for each row"
            )
    return joined


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _fill_in(taken: list[dict[str, Any]], items: Sequence[Item], spec: Spec) -> None:
    """Give all items the same arguments, where it is known what it means to have none."""
    ids = "input_ids" if "input_ids" in taken[0] else "inputs_embeds"
    shapes = {one[ids].shape[1] for one in taken if isinstance(one.get(ids), Tensor)}
    if len(shapes) > 1 and (spec.anything or "attention_mask" in spec.names):
        for one in taken:
            if one.get("attention_mask") is None:
                one["attention_mask"] = one[ids].new_ones(one[ids].shape[:2], dtype=torch.long)
    every = dict.fromkeys(key for one in taken for key in one)
    for one, item in zip(taken, items, strict=True):
        for key in every:
            if key in one:
                continue
            other = next(o[key] for o in taken if key in o)
            if key in MASKS and isinstance(one.get(ids), Tensor):
                one[key] = one[ids].new_full(one[ids].shape[:2], MASKS[key], dtype=torch.long)
            elif key in spec.context and isinstance(other, Tensor):
                one[key] = other.new_zeros(item.rows, *other.shape[1:])
            elif key in spec.context:
                one[key] = [None] * item.rows
            else:
                raise TrainingError(
                    f"the batches of run {item.name!r} have no {key}, and those of others in the "
                    "same pass do; give it in all of them"
                )


def _cat(key: str, values: list[Tensor], joined: Joined, spec: Spec) -> Tensor:
    """The values of one argument; shorter sequences are filled up on the right."""
    if key in spec.padding and values[0].ndim > 1:
        longest = max(v.shape[1] for v in values if v.ndim > 1)
        for lengths, v in zip(joined.lengths, values, strict=True):
            lengths[longest] = v.shape[1] if v.ndim > 1 else 0
    if len({v.shape[1:] for v in values}) > 1:
        ragged = len({v.shape[2:] for v in values}) > 1 or any(v.ndim < 2 for v in values)
        if ragged or key not in spec.padding or (key in ("attention_mask",) and values[0].ndim > 2):
            shapes = ", ".join(
                f"{i.name!r} {tuple(v.shape)}" for i, v in zip(joined.items, values, strict=True)
            )
            raise TrainingError(
                f"{key} has other shapes in other runs ({shapes}), so their rows cannot be one "
                f"batch; give batches of one shape, or padding={{{key!r}: value}} where it is a "
                "sequence (rows, length, ...)"
            )
        value = spec.padding[key]
        for i, v in enumerate(values):
            sides = (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1])
            values[i] = F.pad(v, sides, value=value)
    return values[0] if len(values) == 1 else torch.cat(values)


def pack(items: Sequence[Item], most: int | None) -> list[list[Item]]:
    """Items in groups that are one pass each: no run twice in a group, no more than ``most`` rows
    unless one item has more by itself, and what must not be padded beside its like.
    """
    groups: list[list[Item]] = []
    for item in items:
        for group in groups:
            rows = sum(other.rows for other in group) + item.rows
            fits = most is None or rows <= most
            if fits and all(other.name != item.name and _fit(item, other) for other in group):
                group.append(item)
                break
        else:
            groups.append([item])
    return groups


def _fit(a: Item, b: Item) -> bool:
    if not (a.alike or b.alike):
        return True
    mine, theirs = ({k: t.shape[1:] for k, t in i.batch.items() if isinstance(t, Tensor)}
                    for i in (a, b))  # fmt: skip
    return mine == theirs
