"""Injection: plan an adapter's parts, build them, put them in place; whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, TargetConfig
from ..errors import StateError, TargetError, warn
from ..targets.offer import Offer
from ..targets.plan import MAIN, Key, Slot, plan
from ..targets.replicas import replicated
from .adapter import Adapter, Shared
from .host import Host, LayerHost, no_autocast
from .module import ModuleHost
from .schedule import Schedule
from .site import ParameterSite, kind_of
from .switch import BASE, Switch
from .ties import Tied
from .tree import hosts, inside, parameters, put, walk


@dataclass
class Built:
    """Parts that are not yet in place, and what they share."""

    parts: dict[Key, tuple[Host, Adapter]]
    shared: Shared | None


def inject(
    model: nn.Module,
    config: TargetConfig,
    name: str,
    switch: Switch | None = None,
    *,
    start: bool = True,
    autocast: bool = True,
    meta: bool = False,
) -> Switch:
    """Add an adapter to a model, in place.

    Args:
        model: the user's model, with or without adapters.
        config: the method and where it goes; a copy of it is kept.
        name: the adapter's name.
        switch: that of a model whose last adapter was deleted; by default the model's, or a new
            one.
        start: fill the tensors with the method's starting values; False where a file follows.
        autocast: tensors are fp32 where the base is fp16 or bf16.
        meta: leave the tensors on the meta device.

    Raises:
        TargetError: a pattern matches nothing.
        StateError: the name cannot be used, or adapters are merged.
    """
    switch = switch_of(model) or switch or Switch()
    check_name(name, switch.configs)
    _need_unmerged(model)
    config = copy.deepcopy(config)
    trainable = frozenset(n for n, p in parameters(model) if p.requires_grad)
    with replicated(model, config, switch):
        slots = plan(Offer(model), config)
        built = build(model, slots, config, switch, start=start, autocast=autocast)
    _warn_of_high_rank(built)
    if not switch.configs:
        switch.trainable = trainable
        model.requires_grad_(False)
    _place(model, name, built, meta)
    switch.take(name, config)
    if built.shared is not None:
        switch.shared[name] = built.shared
    switch.activate(switch.active or (name,))
    for host in {id(h): h for h, _ in built.parts.values()}.values():
        host.set_requires_grad(name, not config.inference_mode and name in switch.active)
    _follow(switch, name, config, built)
    config.attached(model, switch)
    return switch


def switch_of(model: nn.Module) -> Switch | None:
    """The switch of a model that has adapters."""
    return next((m.switch for _, m in walk(model) if isinstance(m, Host)), None)


def _need_unmerged(model: nn.Module) -> None:
    if any(host.merged_adapters for host in hosts(model).values()):
        raise StateError(
            "adapters are merged into this model: unmerge_adapter() first, then add another"
        )


def check_name(name: str, taken: Any) -> None:
    """Refuse a name that cannot be an adapter's.

    Raises:
        StateError: the name is empty, has a dot, is reserved, or is taken.
    """
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise StateError(
            f"{name!r} cannot be an adapter's name: give one without a dot, such as 'default'"
        )
    if name in taken:
        raise StateError(
            f"there is an adapter {name!r} already; choose another name, or "
            f"delete_adapter({name!r}) first"
        )


def build(
    model: nn.Module,
    slots: list[Slot],
    config: TargetConfig,
    switch: Switch,
    *,
    start: bool,
    autocast: bool,
) -> Built:
    """The parts and their hosts, not yet in place."""
    modules = dict(walk(model))
    found: dict[int, Host] = {}
    for slot in slots:
        module = modules[slot.path]
        if not isinstance(module, Host):
            kind = LayerHost if kind_of(module) else ModuleHost
            module = found.get(id(module)) or kind(module, switch, slot.path)
        found[id(inside(module))] = module
    places = [(slot, found[id(inside(modules[slot.path]))]) for slot in slots]
    sites = [host.site_of(slot.key) for slot, host in places if slot.level == MAIN]
    dtype = _dtype(places[0][1], autocast)
    with _building(places[0][1]):
        shared = config.share([site for site in sites if site is not None])
        if shared is not None:
            if start:
                shared.start()
            shared.to(dtype)
    built = Built({}, shared)
    for slot, host in places:
        if slot.source is not None:
            source = built.parts[slot.source][1]
            part: Adapter = Tied(source, slot.transposed, slot.saved)
        else:
            part = _make(slot, host, shared, start=start, autocast=autocast)
        part.prefix, part.times = slot.prefix, slot.times if part.linear else 1.0
        built.parts[slot.path, slot.key] = host, part
    return built


def _dtype(host: Host, autocast: bool) -> torch.dtype:
    weight = next(host.base_layer.parameters(), torch.empty(0))
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return torch.promote_types(dtype, torch.float32) if autocast else dtype


@contextmanager
def _building(host: Host) -> Iterator[None]:
    """New tensors are fp32 and on the layer's device; nothing is recorded or cast."""
    weight = next(host.base_layer.parameters(), torch.empty(0))
    with _fresh(weight.device), torch.no_grad(), no_autocast(host.base_layer):
        yield


def _make(slot: Slot, host: Host, shared: Shared | None, *, start: bool, autocast: bool) -> Adapter:
    assert slot.build is not None
    with _building(host):
        part = slot.build(host, shared)
        if part.instead() is not None:
            return part
        site: Any = host.site_of(slot.key)  # none where the part acts beside a whole module
        if isinstance(site, ParameterSite) and (reason := part.FORBIDS.get("merge")):
            raise TargetError(
                f"{type(part).__name__} cannot sit at {site.name}, which is read by its module's "
                f"own code: {reason}"
            )
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in part.modules())
        if isinstance(site, ParameterSite) and drops:
            raise TargetError(
                f"dropout acts on a layer's input, and {site.name} is read by its module's own "
                "code: set the dropout to 0, for this one alone with overrides={...}"
            )
        part.derive(site)
        if start:
            part.start(site)
        return part.to(_dtype(host, autocast))


@contextmanager
def _fresh(device: torch.device) -> Iterator[None]:
    """New tensors are fp32 and on the device, whatever the program's defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _place(model: nn.Module, name: str, built: Built, meta: bool) -> None:
    everywhere: dict[int, list[str]] = {}  # a module that is shared stands at several paths
    for path, module in walk(model):
        everywhere.setdefault(id(inside(module)), []).append(path)
    owner = next(iter(built.parts.values()))[0]
    every = [*built.parts.items(), *([((owner.path, "shared"), (owner, built.shared))])]
    for (_, key), (host, part) in every:
        if part is None:
            continue
        if meta and not (isinstance(part, Adapter) and part.ready):
            _to_meta(part)
        host.adopt(name, key, part)
        for path in everywhere[id(host.base_layer)]:
            put(model, path, host)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # its fused path reads weights, and
            for host in hosts(module).values():  # calls no layer; a hook keeps it from that
                if not host._forward_pre_hooks:
                    host.register_forward_pre_hook(_called)


def _called(*_: Any) -> None:
    """A hook that does nothing."""


def _to_meta(part: nn.Module) -> None:
    for module in part.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)


def _follow(switch: Switch, name: str, config: PeftConfig, built: Built) -> None:
    """Register the schedule of an adapter whose config has one, or a penalty."""
    if config.has_penalty() or config.has_schedule():
        own, parts = config.adapter(), {}
        for (_, key), (host, part) in built.parts.items():
            inner = [m for m in part.modules() if isinstance(m, own)]  # a stack has several
            for i, one in enumerate(inner):
                at = host.need_site(key).name
                parts[at if one is part else f"{at}[{i}]"] = one
        switch.schedules[name] = Schedule(config, parts)


def _warn_of_high_rank(built: Built) -> None:
    high = [
        f"r={part.rank()} at {path} {site.describe()}"
        for (path, key), (host, part) in built.parts.items()
        if (site := host.site_of(key)) and (part.rank() or 0) > min(site.shape)
    ]
    if high:
        more = f" and {len(high) - 1} more" if len(high) > 1 else ""
        warn(
            "a rank above the smaller side of a layer adds parameters and nothing else: "
            f"{high[0]}{more}; use rank_pattern"
        )
