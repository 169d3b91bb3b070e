"""PEFT's reports, word for word, for ``as_peft()``: a row for each of PEFT's layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..engine.host import Host
from ..engine.root import Grafted
from ..engine.tree import walk
from ..errors import StateError
from ..model.peft_model import PeftModel
from ..model.report import TunerLayerStatus, TunerModelStatus, count
from .classes import class_name, methods_at
from .facts import LAYERS
from .tree import TOKENS, Entry, shape

# packages of peft.tuners whose layers print themselves without its name
BARE = frozenset("beft ia3 supertuning unilora".split())


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """PEFT's report on each of its layers.

    Raises:
        TypeError: the adapter is a prompt.
        ValueError: there is no adapter.
    """
    root = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(root, Grafted) and not any(methods_at(h) for h in root.hosts().values()):
        if any(c.is_prompt_learning or c.is_adaption_prompt for c in root.switch.configs.values()):
            raise TypeError(
                "get_layer_status() got an invalid PeftModel instance; prefix tuning and adaption "
                "prompt are not supported."
            )
    inner, front = (root.model, "model.") if isinstance(root, Grafted) else (root, "")
    hosts = ((front + path, m) for path, m in walk(inner) if isinstance(m, Host))
    rows = [row for path, host in hosts for row in _rows(path, host)]
    if not rows:
        raise StateError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that "
            "you have PEFT adapters injected in the model."
        )
    return rows


def _rows(path: str, host: Host) -> list[TunerLayerStatus]:
    found = shape(host)
    groups: dict[str, list[Entry]] = {}
    for entry in found.own:
        groups.setdefault(entry.wrapper, []).append(entry)
    rows = [
        _row(f"{path}.{wrapper}" if wrapper else path, _type(host, wrapper), host, own)
        for wrapper, own in sorted(groups.items(), key=lambda pair: len(pair[0]))
    ]
    copies = found.children.get("modules_to_save")
    if copies is not None:
        flags = {n: [p.requires_grad for p in m.parameters()] for n, m in copies.named_children()}
        places = {n: {p.device.type for p in m.parameters()} for n, m in copies.named_children()}
        rows.append(_status(path, "ModulesToSaveWrapper", host, flags, places))
    return rows


def _type(host: Host, wrapper: str) -> str:
    if wrapper.endswith(TOKENS):
        return "TrainableTokensLayer"
    if wrapper.endswith("out_proj"):
        return "lora.Linear"
    package, _, name = class_name(host).rpartition(".")
    return name if package in BARE or not package else f"{package}.{name}"


def _row(path: str, kind: str, host: Host, own: list[Entry]) -> TunerLayerStatus:
    flags: dict[str, list[bool]] = {}
    places: dict[str, set[str]] = {}
    for entry in own:
        config = host.switch.configs[entry.adapter]
        trained = LAYERS.get(config.method, ({},))[0]
        if entry.attribute in trained or entry.wrapper.endswith(TOKENS):
            flags.setdefault(entry.adapter, []).append(entry.tensor.requires_grad)
        places.setdefault(entry.adapter, set()).add(entry.tensor.device.type)
    return _status(path, kind, host, flags, places)


def _status(
    path: str, kind: str, host: Host, flags: dict[str, list[bool]], places: dict[str, set[str]]
) -> TunerLayerStatus:
    return TunerLayerStatus(
        name=path,
        module_type=kind,
        enabled=host.switch.enabled,
        active_adapters=list(host.switch.active),
        merged_adapters=list(host.merged_adapters),
        requires_grad={name: _agreed(values) for name, values in flags.items()},
        available_adapters=sorted(places),
        devices={name: sorted(found) for name, found in places.items()},
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """PEFT's report on the model.

    Raises:
        TypeError: the adapter is a prompt.
        ValueError: there is no adapter.
    """
    layers = get_layer_status(model)
    root = model.base_model if isinstance(model, PeftModel) else None
    names = sorted({n for layer in layers for n in layer.available_adapters})
    flags: dict[str, list[Any]] = {}
    devices: dict[str, set[str]] = {}
    for layer in layers:
        for name, flag in layer.requires_grad.items():
            flags.setdefault(name, []).append(flag)
        for name, found in layer.devices.items():
            devices.setdefault(name, set()).update(found)
    trainable, total = count(model)
    plain = "other" if not hasattr(model, "config") else type(model).__name__
    return TunerModelStatus(
        base_model_type=plain if root is None else type(root.model).__name__,
        adapter_model_type="None" if root is None else type(root).__name__,
        peft_types={} if root is None else {n: c.method for n, c in root.switch.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=layers[0].enabled,
        active_adapters=layers[0].active_adapters,
        merged_adapters=_merged(layers),
        requires_grad={name: _same(values) for name, values in flags.items()},
        available_adapters=names,
        devices={name: sorted(found) for name, found in devices.items()},
    )


def _merged(layers: list[TunerLayerStatus]) -> Any:
    """What is merged; "irregular" where a layer that has an adapter has it unmerged."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    for layer in layers:
        if merged.intersection(layer.available_adapters) - set(layer.merged_adapters):
            return "irregular"
    return sorted(merged)


def _agreed(flags: list[bool]) -> bool | str:
    return True if all(flags) else "irregular" if any(flags) else False


def _same(flags: list[Any]) -> Any:
    return flags[0] if len(Counter(map(str, flags))) == 1 else "irregular"
