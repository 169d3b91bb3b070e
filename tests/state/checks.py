"""What is looked at after each operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from reference import Reference, Refused
from torch import Tensor, nn
from zoo import IDS, PATHS

from graftwork import GraftworkError

FRONT = "base_model.model."
HOOKS = [n for n in vars(nn.Linear(1, 1)) if n.endswith("_hooks")]


class DivergenceError(AssertionError):
    """The library and the reference do not agree."""


def need(true: bool, text: str) -> None:
    if not true:
        raise DivergenceError(text)


def near(value: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    value, want = value.detach().double(), want.detach().double()
    need(value.shape == want.shape, f"{what} has the shape {tuple(value.shape)}")
    far = float((value - want).abs().max())
    limit = tolerance * (1 + float(want.abs().max()))
    need(far <= limit, f"{what} is off by {far:.2e}, more than {limit:.2e}")


def same_bits(have: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str) -> None:
    need(have.keys() == want.keys(), f"{what}: {sorted(have.keys() ^ want.keys())} on one side")
    for key, tensor in have.items():
        other = want[key]
        same = tensor.dtype == other.dtype and torch.equal(tensor, other)
        need(same, f"{what}: {key} has other bits")


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by the model's own paths."""
    return {k.removeprefix("base_model.").removeprefix("model."): t for k, t in tensors.items()}


def owner(key: str, names: Sequence[str]) -> str | None:
    """To which of these adapters a tensor of the state dict belongs; names hold no dot."""
    path, _, rest = key.removeprefix(FRONT).partition(".adapters.")
    name = rest.partition(".")[0]
    return name if path in PATHS and name in names else None


def _hooks(module: nn.Module, kind: str) -> list[Any]:
    return [hook for hook in getattr(module, kind).values() if callable(hook)]


def _watches(hook: Any) -> bool:
    """Whether it is there until a training step has shown that the adapters take effect."""
    return type(getattr(hook, "__self__", hook)).__module__.startswith("graftwork.model.")


def verify(
    model: Any, reference: Reference, raw: Mapping[str, Mapping[str, Tensor]], tolerance: float
) -> None:
    """Compare all that can be seen of a model with what the reference says."""
    found = ((n, hook) for n, m in model.named_modules() for h in HOOKS for hook in _hooks(m, h))
    hooks = {name for name, hook in found if not _watches(hook)}
    prompts = any(record.prompt for record in reference.adapters.values())
    need(hooks == {FRONT.strip(".")} if prompts else not hooks, f"hooks at {hooks}")
    modes = {m.training for m in model.modules()}
    need(modes == {reference.training}, f"training is {modes}, not {reference.training}")
    if reference.wrapped:
        _switch(model, reference)
    _flags(model, reference)
    _bits(model, reference, raw)
    _outputs(model, reference, tolerance)


def _switch(model: Any, reference: Reference) -> None:
    for what, have, want in (
        ("active_adapters", model.active_adapters, list(reference.active)),
        ("the adapters", list(model.peft_config), list(reference.adapters)),
        ("enabled", model.base_model.switch.enabled, reference.enabled),
        ("merged", model.base_model.switch.merged, reference.merged),
    ):
        need(have == want, f"{what}: {have}, not {want}")
    hosts = model.base_model.hosts()
    places = {p for record in reference.adapters.values() for p in record.at}
    need(hosts.keys() == places, f"hosts at {sorted(hosts)}, not {sorted(places)}")
    for path, host in hosts.items():
        want, merged = reference.here(path, list(reference.adapters)), host.merged_adapters
        need(set(host.adapters) == set(want), f"{path} has {list(host.adapters)}, not {want}")
        need(merged == reference.here(path, reference.merged), f"{merged} are merged into {path}")
    for name, record in reference.adapters.items():
        config = model.peft_config[name]
        need(config.method == record.config.method, f"{name!r} is a {config.method}")
        need(config.inference_mode == record.inference, f"{name!r}: inference_mode")


def _flags(model: Any, reference: Reference) -> None:
    names = list(reference.adapters)
    for key, p in model.named_parameters():
        name = owner(key, names)
        if name is not None:
            want = reference.adapters[name].trains
        else:
            want = not reference.wrapped and key in reference.trainable
        need(p.requires_grad == want, f"requires_grad of {key} is {p.requires_grad}")


def _bits(model: Any, reference: Reference, raw: Mapping[str, Mapping[str, Tensor]]) -> None:
    places = {p for record in reference.adapters.values() for p in record.at}
    want: dict[str, Tensor] = {k: t for tensors in raw.values() for k, t in tensors.items()}
    now = dict(reference.base)
    for tensors in reference.written.values():
        now |= tensors
    for key, tensor in now.items():
        path, _, leaf = key.rpartition(".")
        inside = f"{path}.base_layer" if path in places else path
        want[f"{FRONT if reference.wrapped else ''}{inside}.{leaf}"] = tensor
    same_bits(model.state_dict(), want, "the state dict")


def _outputs(model: Any, reference: Reference, tolerance: float) -> None:
    try:
        want = reference.output()
    except Refused:
        try:
            model(IDS)
        except GraftworkError:
            return
        raise DivergenceError("it runs without the base that it needs") from None
    with torch.no_grad():
        near(model(IDS), want, tolerance, "the output")
