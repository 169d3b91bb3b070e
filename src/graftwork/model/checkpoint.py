"""torch's older kind of gradient checkpointing (reentrant) gives a block's tensors no gradient
where none of the block's inputs asks for one, as in a frozen model. Here blocks with adapters that
train get one more input, which does.

It is looked at when a block is run, so it does not matter who switched checkpointing on, or when,
nor what the block is given: embeddings, pictures, ids.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as theirs
from torch import Tensor, nn

from ..engine.host import Host
from ..engine.switch import BASE


def install() -> None:
    """Let torch's reentrant checkpointing reach adapters; models without any are as ever."""
    plain: Any = theirs.CheckpointFunction
    if getattr(plain, "reaches", False):
        return

    class CheckpointFunction(plain):  # type: ignore[misc]
        """torch's, called with one more input where that is what its gradients need."""

        reaches = True

        @classmethod
        def apply(cls, run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            if torch.is_grad_enabled() and not any(map(_asks, args)) and learns(run):
                asking = torch.zeros((), device="cpu", requires_grad=True)
                return plain.apply(functools.partial(_without_first, run), preserve, asking, *args)
            return plain.apply(run, preserve, *args)

    theirs.CheckpointFunction = CheckpointFunction  # type: ignore[misc]


def _without_first(run: Callable[..., Any], _: Tensor, *args: Any) -> Any:
    return run(*args)


def _asks(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def learns(run: Callable[..., Any]) -> bool:
    """Whether a function runs layers whose adapters train now."""
    seen: set[int] = set()
    hosts = (m for module in _modules_of(run, seen) for m in module.modules())
    return any(isinstance(host, Host) and _trains(host) for host in hosts)


def _trains(host: Host) -> bool:
    call = host.switch.current()
    names = tuple(n for n in call.rows or call.active if n != BASE)
    for part in host.parts(() if names == host.merged_adapters else host.present(names)):
        shared = () if part.shared is None else part.shared.parameters()
        if any(p.requires_grad for own in (part.parameters(), shared) for p in own):
            return True
    return False


def _modules_of(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a function holds: its own, those it was bound to, those around it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    held: list[Any] = []
    if isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        held = [value.__self__, value.__func__]
    elif inspect.isfunction(value):
        for cell in value.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        held += [value.__wrapped__] if hasattr(value, "__wrapped__") else []
        held += value.__defaults__ or ()
    elif isinstance(value, (list, tuple)):
        held = list(value)
    for one in held:
        yield from _modules_of(one, seen)
