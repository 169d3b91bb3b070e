"""Forwards of the user's model by itself, where adapters need something of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .root import Grafted


@contextmanager
def each_forward(root: Grafted, names: Iterable[str]) -> Iterator[None]:
    """Within the block each forward of the model in ``root`` has what these adapters prepare."""
    switch, model, names = root.switch, root.model, root.preparing(names)
    call, configs = switch.current(), switch.configs

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if switch.current() is call:  # and not what ``before`` itself runs
            for name in names:
                call.context.update(configs[name].before(root, name, args, kwargs))

    def after(_: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        for name in names if switch.current() is call and call.rows is None else ():
            outputs = configs[name].after(root, name, outputs, args, kwargs)
        return outputs

    hooks = []
    if names:
        hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(model.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
