"""Schedules and penalties: what some methods do beside the forward pass, driven by the optimizer's
own steps.

PyTorch calls a hook around the step of every optimizer. The hook finds the adapters whose tensors
that optimizer holds, so nobody has to remember to call anything; where tensors change and no
optimizer's step was seen, training stops with an error instead of going on without its schedule.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..errors import TrainingError
from ..fast.flags import trains
from ..fast.shards import parts_in, sharding, whole

if TYPE_CHECKING:
    from ..config import PeftConfig
    from .adapter import Adapter

_LIVE: weakref.WeakSet[Schedule] = weakref.WeakSet()
_HOOKED: list[Any] = []


class Schedule:
    """The adapters of one name, by path, that follow the optimizer, and how far they are."""

    def __init__(self, config: PeftConfig, adapters: dict[str, Adapter]) -> None:
        self.config, self.adapters = config, adapters
        self.step = 0
        # since the last step: the penalty's gradient has come with the loss; a forward's loss has
        # it; a program has it, to add it itself
        self.delivered = self.added = self.handed = False
        self.version: int | None = None
        self.unseen = 0  # forwards in a row before which tensors changed and no step was seen
        self.watch()

    def watch(self) -> None:
        """Be called by optimizers from now on."""
        if not _HOOKED:
            _HOOKED.append(register_optimizer_step_pre_hook(_before))
            _HOOKED.append(register_optimizer_step_post_hook(_after))
        _LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch()

    def tensors(self) -> Iterator[Tensor]:
        """All that may train."""
        parts = (part for a in self.adapters.values() for part in (a, a.shared) if part is not None)
        return (p for part in parts for p in part.parameters())

    def first(self) -> Tensor | None:
        """A tensor that trains, by which the others are watched."""
        return next(filter(trains, self.tensors()), None)

    def penalty(self) -> Tensor | None:
        """The term of the loss, noted as delivered when its gradient is computed."""
        term = self.config.penalty(self.adapters)
        if isinstance(term, Tensor) and term.requires_grad:
            if torch.compiler.is_compiling():
                self.delivered = True
            else:
                term.register_hook(self._deliver)  # type: ignore[no-untyped-call]
        return term

    def hand(self) -> Tensor:
        """The penalty for a program that adds it itself, which the engine then does not; zero where
        a forward has added it.
        """
        term = None if self.added else self.penalty()
        self.handed |= term is not None and term.requires_grad
        return torch.zeros(()) if term is None else term

    def _deliver(self, _: Tensor) -> None:
        self.delivered = True

    def check(self) -> None:
        """Before a training forward: have the tensors been changed by something that is no torch
        optimizer?

        Raises:
            TrainingError: they have, again and again.
        """
        first = self.first()
        if first is None or not self.config.has_schedule() or torch.compiler.is_compiling():
            return
        changed = self.version is not None and first._version != self.version
        self.unseen = self.unseen + 1 if changed else 0
        self.version = first._version
        if self.unseen > 1:
            raise TrainingError(
                f"{type(self.config).__name__} follows the optimizer's steps, but the adapter "
                "changes and no step of a torch optimizer that holds its parameters was seen, so "
                "its schedule stands still. Train it with a torch.optim.Optimizer built from "
                "model.parameters()"
            )

    def whole(self) -> Any:
        """A context in which the adapters are whole, where processes hold parts of them."""
        return whole(None, self.adapters.values(), write=True) if sharding() else nullcontext()

    def before_step(self) -> None:
        with self.whole():
            term = None if self.delivered else self.config.penalty(self.adapters)
            if isinstance(term, Tensor) and term.requires_grad:
                term.backward()  # type: ignore[no-untyped-call]
        self.delivered = self.added = self.handed = False

    def after_step(self) -> None:
        self.step += 1
        with self.whole():
            self.config.after_step(self.adapters, self.step)
        first = self.first()
        self.version, self.unseen = None if first is None else first._version, 0


def _held(optimizer: Optimizer) -> list[Schedule]:
    groups = optimizer.param_groups if _LIVE else []
    held = {id(p) for group in groups for p in group["params"] if p.grad is not None}
    return [s for s in _LIVE if any(id(p) in held for p in s.tensors())]


def _before(optimizer: Optimizer, *_: Any) -> None:
    for schedule in _held(optimizer):
        with torch.enable_grad():
            schedule.before_step()


def _after(optimizer: Optimizer, *_: Any) -> None:
    for schedule in _held(optimizer):
        schedule.after_step()


def add_to_loss(outputs: Any, schedules: list[Schedule]) -> Any:
    """A model's outputs with the penalties added to their loss, where they have one."""
    named = isinstance(outputs, Mapping)
    loss = outputs.get("loss") if named else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        return outputs
    total = loss
    for schedule in schedules:
        if sharding() and parts_in(schedule.adapters.values()):
            continue  # the step brings its gradient
        if not schedule.handed and (term := schedule.penalty()) is not None:
            total, schedule.added = total + term.to(loss.dtype), True
    if total is not loss:
        outputs.__setitem__("loss", total) if named else setattr(outputs, "loss", total)
    return outputs
