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
def active_adapter(host: Host) -> str | list[str]:
    """The active adapter, or a list where it is not just one."""
    names = list(host.switch.active)
    return names[0] if len(names) == 1 else names


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
    names = host.switch.check(adapter_names)
    host.switch.activate(names)
    for name in host.adapters:
        host.set_requires_grad(name, name in names and not inference_mode)


@verb
def enable_adapters(host: Host, enabled: bool) -> None:
    """Switch all adapters of the whole model on or off."""
    host.switch.activate(enabled=enabled)


@verb
def delete_adapter(host: Host, adapter_name: str) -> None:
    """Drop an adapter's tensors at this layer."""
    if adapter_name in host.adapters:
        del host.adapters[adapter_name]
        host.switch.flags.forget()


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


def _tensor(name: str) -> Callable[[Any], Any]:
    """A tensor as PEFT shows it: ``layer.lora_A["default"].weight``, ``layer.ia3_l["default"]``."""

    def find(part: Any) -> Any:
        for key, tensor in part.file_tensors().items():
            first, _, rest = key.partition(".")
            if first == name:
                return SimpleNamespace(**{rest: tensor}) if rest else tensor
        return None

    return find


for _name in (
    "lora_A lora_B lora_E lora_embedding_A lora_embedding_B lora_magnitude_vector ia3_l "
    "trainable_tokens_delta"
).split():
    _shown_unless_the_layer_has_it(_name, _tensor(_name))
_shown_unless_the_layer_has_it("scaling", lambda part: part.scale if part.rank() else None)
_shown_unless_the_layer_has_it("r", lambda part: part.rank())
