"""PEFT's names on a host, for programs that walk over a model's layers (``BaseTunerLayer`` in
PEFT).

The state is the model's; a layer only shows it. Each function below becomes an attribute of every
host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..engine.host import NAMES, Host
from ..errors import POLICY


def shown(function: Callable[[Host], Any]) -> Callable[[Host], Any]:
    """Make a function of a host an attribute of hosts."""
    NAMES[function.__name__] = function
    return function


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of a host and arguments a method of hosts."""
    NAMES[function.__name__] = lambda host: partial(function, host)
    return function


@shown
def active_adapters(host: Host) -> list[str]:
    """The model's active adapters."""
    return list(host.switch.active)


@shown
def active_adapter(host: Host) -> list[str]:
    """PEFT's other name for that, on a layer a list too."""
    return list(host.switch.active)


@shown
def disable_adapters(host: Host) -> bool:
    """Whether all adapters of the model are switched off."""
    return not host.switch.enabled


@shown
def merged(host: Host) -> bool:
    """Whether adapters are merged into this layer."""
    return bool(host.merged_adapters)


@verb
def get_base_layer(host: Host) -> nn.Module:
    """The user's own layer."""
    return host.base_layer


@verb
def set_adapter(
    host: Host, adapter_names: str | Sequence[str], inference_mode: bool = False
) -> None:
    """Make adapters active in the whole model, and trainable here unless ``inference_mode``."""
    names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
    if POLICY.lenient:  # diffusers names to each of its models the adapters of all of them
        names = tuple(name for name in names if name in host.switch.configs)
    names = host.switch.check(names)
    host.switch.activate(names)
    for name in host.adapters:
        host.set_requires_grad(name, name in names and not inference_mode)


@verb
def enable_adapters(host: Host, enabled: bool) -> None:
    """Switch all adapters of the whole model on or off."""
    host.switch.activate(enabled=enabled)


@verb
def delete_adapter(host: Host, adapter_name: str) -> None:
    """Drop an adapter's tensors at this layer; where it alone was active, another one is now."""
    if adapter_name not in host.adapters:
        return
    del host.adapters[adapter_name]
    switch = host.switch
    switch.flags.forget()
    if adapter_name in switch.active:
        left = [name for name in switch.active if name != adapter_name]
        switch.activate(tuple(left or list(host.adapters)[:1]))
    for name in host.present(switch.active):
        host.set_requires_grad(name, not switch.configs[name].inference_mode)


@verb
def merge(host: Host, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
    """Write adapters into this layer's weight; it is always checked to be finite."""
    wanted = host.switch.check(adapter_names or host.switch.active)
    names = host.switch.check(host.merged_adapters + wanted)
    host.commit(names, host.prepare(names), True)


@verb
def unmerge(host: Host) -> None:
    """Take the adapters out of this layer's weight again, bit for bit."""
    host.restore()


def _shown_unless_the_layer_has_it(name: str, value: Callable[[Any], Any]) -> None:
    """Show something of each adapter that has it, as in ``layer.scaling["default"]``."""

    def show(host: Host) -> Any:
        if hasattr(host.base_layer, name):  # an attention layer has a scaling of its own
            return getattr(host.base_layer, name)
        parts = [(n, value(part)) for n in host.adapters for _, part in host.parts_of(n)]
        return {n: v for n, v in parts if v is not None}

    NAMES[name] = show


class Shown(SimpleNamespace):
    """What PEFT has a layer for: ``.weight``, ``.bias``, and ``.to``, which moves them in place."""

    def to(self, *args: Any, **kwargs: Any) -> Shown:
        for tensor in vars(self).values():
            tensor.data = tensor.data.to(*args, **kwargs)
        return self


def _tensor(name: str) -> Callable[[Any], Any]:
    """A tensor as PEFT shows it: ``layer.lora_A["default"].weight``, ``layer.ia3_l["default"]``."""

    def find(part: Any) -> Any:
        found = {}
        for key, tensor in part.file_tensors().items():
            first, _, rest = key.partition(".")
            if first == name and not rest:
                return tensor
            if first == name:
                found[rest] = tensor
        return Shown(**found) if found else None

    return find


for _name in (
    "lora_A lora_B lora_E lora_embedding_A lora_embedding_B lora_magnitude_vector ia3_l "
    "trainable_tokens_delta"
).split():
    _shown_unless_the_layer_has_it(_name, _tensor(_name))
_shown_unless_the_layer_has_it("scaling", lambda part: part.scale if part.rank() else None)
_shown_unless_the_layer_has_it("r", lambda part: part.rank())
