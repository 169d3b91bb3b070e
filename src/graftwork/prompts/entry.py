"""Hooks in front of a model, or of the encoder in it, that make room for virtual tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.switch import Switch
from ..engine.tree import hosts
from ..fast.shards import readable_now
from .generating import leave
from .inputs import Inputs
from .positions import placed, tables_of


class Entry:
    """A hook in front of the forward of a model, or of the encoder of an encoder-decoder."""

    def __init__(self, switch: Switch, part: str = "") -> None:
        self.switch, self.part = switch, part  # part: "", or "encoder", "both" for the whole

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = self.switch.current()
        every = {name: self.switch.configs.get(name) for name in call.rows or call.active}
        names = [n for n, c in every.items() if c is not None and c.is_prompt_learning]
        if not names:
            return None
        inputs = Inputs(module, args, kwargs, self.part)
        inputs.enter(call, {name: readable_now(self.switch.shared[name]) for name in names})
        return (), inputs.given


def attach(model: nn.Module, switch: Switch) -> None:
    """Put the hooks in front of a model, once."""
    if any(isinstance(hook, Entry) for hook in model._forward_pre_hooks.values()):
        return
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    model.register_forward_pre_hook(Entry(switch, "both" if two else ""), with_kwargs=True)
    if two:
        encoder: Any = model.get_encoder()  # type: ignore[operator]
        encoder.register_forward_pre_hook(Entry(switch, "encoder"), with_kwargs=True)
    for table in tables_of(model):
        table.register_forward_hook(placed)


def detach(model: nn.Module, switch: Switch) -> None:
    """Take them away where no prompt is left."""
    prompts = [name for name, config in switch.configs.items() if config.is_prompt_learning]
    if any(name in host.adapters for host in hosts(model).values() for name in prompts):
        return
    leave(model)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Entry):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if hook is placed:
                del module._forward_hooks[key]
