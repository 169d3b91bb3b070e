"""The state of a run's adapter: which of its tensors train, and copies of what training changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.root import Grafted
from ..errors import TrainingError
from ..fast.stack import Stacks
from ..parts.whole import Copy


class Held:
    """An adapter of a model, by what of it there is at all hosts.

    Args:
        root: the model's root.
        name: the adapter.

    Raises:
        TrainingError: it has nothing to train.
    """

    def __init__(self, root: Grafted, name: str) -> None:
        self.name, self.config = name, root.switch.configs[name]
        self.modules: list[nn.Module] = [
            host.adapters[name] for host in root.hosts().values() if name in host.adapters
        ]
        every = {id(p): p for m in self.modules for p in m.parameters() if p.requires_grad}
        inner = [one for m in self.modules for one in m.modules() if isinstance(one, Copy)]
        heads = {id(p): p for one in inner for p in one.parameters() if p.requires_grad}
        self.own = [p for key, p in every.items() if key not in heads]
        self.heads = list(heads.values())
        if not every:
            raise TrainingError(
                f"the adapter {name!r} has no tensor that can be trained; "
                f"set_requires_grad({name!r}) first, or leave its run out"
            )

    @property
    def parameters(self) -> list[Tensor]:
        """All that trains."""
        return [*self.own, *self.heads]

    def _buffers(self) -> dict[tuple[int, str], tuple[nn.Module, Tensor]]:
        """What else changes: tensors that follow from a seed alone do not."""
        return {
            (id(owner), name): (owner, tensor)
            for module in self.modules
            for owner in module.modules()
            for name, tensor in owner._buffers.items()
            if tensor is not None and name not in getattr(owner, "drawn", ())
        }

    @torch.no_grad()
    def copy(self) -> dict[str, Any]:
        """The state now."""
        return {
            "parameters": [p.detach().clone() for p in self.parameters],
            "buffers": {key: t.clone() for key, (_, t) in self._buffers().items()},
            "config": dict(vars(self.config)),  # AdaLoRA writes its ranks there
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Make the adapter what it was."""
        for p, old in zip(self.parameters, state["parameters"], strict=True):
            p.copy_(old)
        for key, (owner, now) in self._buffers().items():
            old = state["buffers"][key]
            if now.shape == old.shape:
                now.copy_(old)
            else:
                owner._buffers[key[1]] = old.clone()
        vars(self.config).update(state["config"])


@contextmanager
def learning(model: nn.Module, root: Grafted, held: list[Held], dropout: bool) -> Iterator[None]:
    """Within the block the adapters train, and the base does not drop anything unless ``dropout``.

    Raises:
        TrainingError: gradient checkpointing, which acts in training mode alone, is on in modules
            that drop something themselves.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            again = bool(getattr(module, "gradient_checkpointing", False))
            if again and not dropout:
                _need_no_dropout(module)
            module.training = dropout or again
        model.training = root.training = True
        for one in held:
            for part in one.modules:
                part.train()
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _need_no_dropout(module: nn.Module) -> None:
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            raise TrainingError(
                f"{type(module).__name__} has {name}={value} and gradient checkpointing, which "
                "acts in training mode alone, and then this dropout does too; load the model with "
                "its dropout at 0, or give train_together(base_dropout=True)"
            )


class Lying:
    """Factors of runs, held in stacks at the layers while they learn.

    Args:
        root: the model's root.
        learning: what may be in a stack.
    """

    def __init__(self, root: Grafted, learning: Iterable[Tensor]) -> None:
        self.kept = [host.stacks for host in root.hosts().values()]
        self.stacks = Stacks(learning)

    def __enter__(self) -> Stacks:
        for kept in self.kept:
            kept.lie(self.stacks)
        return self.stacks

    def __exit__(self, *_: object) -> None:
        for kept in self.kept:
            kept.lie(None)
        self.stacks.release()

    def release(self, factors: Iterable[Tensor]) -> None:
        """Undo the stacks that some factors are in, or no more hold; the next forward makes others
        of the rest.
        """
        if self.stacks.release(factors):
            for kept in self.kept:
                kept.lie(self.stacks)


@contextmanager
def resting(held: list[Held]) -> Iterator[None]:
    """Within the block adapters drop nothing, for an evaluation."""
    modules = [m for one in held for part in one.modules for m in part.modules()]
    before = [(m, m.training) for m in modules]
    try:
        for m, _ in before:
            m.training = False
        yield
    finally:
        for m, mode in before:
            m.training = mode
