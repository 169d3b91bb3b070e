"""Injection: plan an adapter's parts, build them, put them in place; whole or not at all."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..config import PeftConfig, TargetConfig
from ..errors import StateError, TargetError, warn
from ..fast.pause import uncollected
from ..fast.shards import may_be_parted, readable
from ..fast.tensors import device_of, dtype_of, is_all, making, to_meta
from ..targets.names import check_name as check_name
from ..targets.offer import Offer
from ..targets.plan import MAIN, Key, Slot, plan
from ..targets.replicas import replicated, restore
from .adapter import Adapter, Shared
from .host import Host, LayerHost
from .module import ModuleHost
from .schedule import Schedule
from .site import ParameterSite, kind_of
from .switch import Switch
from .ties import Tied
from .tree import hosts, inside, parameters, parts, put, walk

WATCHES: list[Callable[[nn.Module, Switch, bool], None]] = []  # see model/canary.py


@dataclass
class Built:
    """Parts that are not yet in place, and what they share."""

    parts: dict[Key, tuple[Host, Adapter]]
    shared: Shared | None


@uncollected()
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
        switch: that of a model whose last adapter was deleted; else the model's, or a new one.
        start: fill the tensors with the method's starting values; False where a file follows.
        autocast: tensors are fp32 where the base is fp16 or bf16.
        meta: leave the tensors on the meta device.

    Raises:
        TargetError: a pattern matches nothing.
        StateError: the name cannot be used, or adapters are merged.
    """
    switch = switch_of(model) or switch or Switch()
    with switch.change(name):
        check_name(name, switch.configs)
        _need_unmerged(model)
        config, start = copy.deepcopy(config), start and not meta  # a file follows
        first = not switch.configs
        trainable = [n for n, p in parameters(model) if p.requires_grad] if first else []
        with replicated(model, config, switch):
            given = {"start": start and not meta, "autocast": autocast}  # meta: a file follows
            built = build(model, plan(Offer(model), config), config, switch, **given)
        _warn_of_high_rank(built)
        if first:
            switch.trainable |= frozenset(trainable)
            model.requires_grad_(False)
        _place(model, name, built, meta)
        switch.take(name, config)
        if built.shared is not None:
            switch.shared[name] = built.shared
        switch.activate((name,) if first else None)
        trains = not config.inference_mode and name in switch.active
        switch.flags.write((name,), trains, partial(parts, model))
        _follow(switch, name, config, built)
        config.attached(model, switch)
        changed(model, switch, trains)
        return switch


def changed(model: nn.Module, switch: Switch, trains: bool) -> None:
    """Tell whoever watches: an adapter is there, to be trained or not, or one is gone."""
    for watch in WATCHES:
        watch(model, switch, trains)


def switch_of(model: nn.Module) -> Switch | None:
    """The switch of a model that has adapters."""
    return next((m.switch for _, m in walk(model) if isinstance(m, Host)), None)


def _need_unmerged(model: nn.Module) -> None:
    if any(host.merged_adapters for host in hosts(model).values()):
        raise StateError(
            "adapters are merged into this model: unmerge_adapter() first, then add another"
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
    dtype = dtype_of(places[0][1].base_layer, autocast)
    with making(device_of(places[0][1].base_layer)):
        shared = config.share([site for site in sites if site is not None])
        if shared is not None:
            if start:
                shared.start()
            shared.to(dtype)
    built, parted = Built({}, shared), may_be_parted([*map(inside, modules.values())])
    for device, group in itertools.groupby(places, lambda place: device_of(place[1].base_layer)):
        with making(device):
            for slot, host in group:
                if slot.source is not None:
                    source = built.parts[slot.source][1]
                    part: Adapter = Tied(source, slot.transposed, slot.saved)
                else:
                    with readable(inside(host), host.path) if parted else nullcontext():
                        part = _make(slot, host, shared, start=start, autocast=autocast)
                vars(part).update(prefix=slot.prefix, times=slot.times if part.linear else 1.0)
                built.parts[slot.path, slot.key] = host, part
    for slot in sorted(slots, key=lambda slot: slot.level):  # a tied end may be beneath the rest
        built.parts[slot.path, slot.key] = built.parts.pop((slot.path, slot.key))
    _need_names(built)
    return built


def _make(slot: Slot, host: Host, shared: Shared | None, *, start: bool, autocast: bool) -> Adapter:
    assert slot.build is not None
    part = slot.build(host, shared)
    if part.instead() is not None:
        return part
    site: Any = host.site_of(slot.key)  # none where the part acts beside a whole module
    if isinstance(site, ParameterSite):
        _check_inside(part, site)
    part.derive(site)
    if start:
        part.start(site)
    dtype = dtype_of(host.base_layer, autocast)
    return part if is_all(part, dtype) else part.to(dtype)


def _check_inside(part: Adapter, site: ParameterSite) -> None:
    if reason := part.FORBIDS.get("merge"):
        raise TargetError(
            f"{type(part).__name__} cannot sit at {site.name}, which is read by its module's "
            f"own code: {reason}"
        )
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in part.modules()):
        raise TargetError(
            f"dropout acts on a layer's input, and {site.name} is read by its module's own "
            "code: set the dropout to 0, for this one alone with overrides={...}"
        )


def _place(model: nn.Module, name: str, built: Built, meta: bool) -> None:
    everywhere: dict[int, list[str]] = {}  # a module that is shared stands at several paths
    encoders, standing = [], set()
    for path, module in walk(model):
        if isinstance(module, Host):
            standing.add(id(module))
        else:
            everywhere.setdefault(id(own := inside(module)), []).append(path)
            encoders += [own] if isinstance(own, nn.TransformerEncoderLayer) else []
    owner = next(iter(built.parts.values()))[0]
    every = [*built.parts.items(), *([((owner.path, "shared"), (owner, built.shared))])]
    for (_, key), (host, part) in every:
        if part is None:
            continue
        if meta and not (isinstance(part, Adapter) and part.ready):
            to_meta(part)
        host.adopt(name, key, part)
        for path in everywhere[id(host.base_layer)] if id(host) not in standing else ():
            put(model, path, host)
        standing.add(id(host))
    for encoder in encoders:  # its fused path reads weights, and calls no layer; a hook keeps it
        for host in hosts(encoder).values():  # from that
            if not host._forward_pre_hooks:
                host.register_forward_pre_hook(_called)


def _called(*_: Any) -> None:
    """A hook that does nothing."""


def _need_names(built: Built) -> None:
    """Stop where two tensors would have one name in a file, as a module's and its child's may."""
    seen: dict[str, str] = {}
    paths = {path for path, _ in built.parts}
    inner = [p for p in paths if any(p[:i] in paths for i, c in enumerate(p) if c == ".")]
    for (path, _), (_, part) in built.parts.items() if inner else ():
        for key in part.file_tensors():
            name = f"{path}.{part.prefix}{key}"
            if (other := seen.setdefault(name, path)) != path:
                raise TargetError(
                    f"tensors at {other} and at {path} would both be called {name} in a file; "
                    "rename that module, or adapt one of the two"
                )


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


def delete(model: nn.Module, switch: Switch, names: Sequence[str]) -> None:
    """Drop adapters from a model."""
    with switch.change(*names):
        switch.check(tuple(names))
        every = hosts(model)
        for path, host in every.items():
            if busy := [n for n in names if n in host.merged_adapters]:
                raise StateError(
                    f"{busy[0]!r} is merged into {path}: unmerge_adapter() before deleting it"
                )
        for host in every.values():
            for name in host.present(tuple(names)):
                del host.adapters[name]
                host.stacks.results.clear()
        for name in names:
            config = switch.configs.pop(name)
            switch.schedules.pop(name, None)
            switch.shared.pop(name, None)
            config.detached(model, switch)
        switch.flags.drop(names)
        left = tuple(n for n in switch.active if n in switch.configs)
        if not left and switch.configs and switch.active:
            left = (next(iter(switch.configs)),)
            warn(f"the active adapter {names[0]!r} was deleted; {left[0]!r} is active now")
            switch.flags.write(
                left, not switch.configs[left[0]].inference_mode, partial(parts, model)
            )
        switch.activate(left)
        if not switch.configs.keys() >= set(switch.before_merge):
            kept = tuple(n for n in switch.before_merge if n in switch.configs)
            switch.before_merge = kept or left
        for path, module in list(walk(model)):
            if isinstance(module, Host) and not len(module.adapters):
                put(model, path, module.base_layer)
        if not switch.configs:
            restore(model)
        changed(model, switch, False)
