"""Whether adapters take effect: which layers a forward reaches, and where its gradients arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.host import Host
from ..engine.tree import inside, walk
from ..errors import StateError, TrainingError
from ..fast.rows import tensors_in

SHOWN = 5  # places that an error names
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
Named = tuple[str, str]  # a place, and a tensor there


@dataclass
class Effect:
    """What one batch has shown.

    Args:
        reached: places of active adapters whose layers ran.
        waiting: places whose modules this batch did not need, such as experts that no token chose
            or the other half of a model for pictures and texts.
        trained: tensors that got a gradient.
        change: the largest difference between the outputs with and without the adapters.
    """

    reached: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    trained: int = 0
    change: float = 0.0

    def __str__(self) -> str:
        waiting = f", {len(self.waiting)} not needed for this batch" if self.waiting else ""
        return (
            f"{len(self.reached)} adapted layers ran{waiting}; {self.trained} tensors get a "
            f"gradient; the outputs change by {self.change:.3g} at most"
        )


def assert_effective(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Effect:
    """See ``PeftModel.assert_effective``."""
    from .canary import paused

    match args:
        case (Mapping() as batch,):
            args, kwargs = (), {**batch, **kwargs}
    root = model.base_model
    names = root.switch.current().active
    if not names:
        raise StateError(
            "no adapter is active, so none can have an effect; set_adapter(name) first"
        )
    if root.merged():
        raise StateError("adapters are merged into the weights; unmerge_adapter() first")
    hosts = {path: host for path, host in root.hosts().items() if host.present(names)}
    with torch.random.fork_rng(), torch.enable_grad(), paused(root.model):
        with _watched(root.model) as ran:
            outputs = model(*args, **kwargs)
    found = _reached(root.model, hosts, ran)
    gradients = _gradients(hosts, names, outputs, set(found.waiting))
    found.trained = sum(g is not None for g in gradients.values())
    _judge(gradients)
    found.change = _change(model, args, kwargs)
    if not gradients and not found.change:
        raise TrainingError(
            f"{list(names)} change nothing: the outputs are those of the base model to the last "
            "bit, and none of their tensors trains. Load their values, or set "
            "set_requires_grad(name) to train them"
        )
    return found


@contextmanager
def _watched(model: nn.Module) -> Iterator[set[int]]:
    """Within the block, modules that run are noted."""
    ran: set[int] = set()

    def note(module: nn.Module, _: Any) -> None:
        ran.add(id(module))

    hooks = [module.register_forward_pre_hook(note) for _, module in walk(model)]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _reached(model: nn.Module, hosts: Mapping[str, Host], ran: set[int]) -> Effect:
    """Which layers ran.

    Raises:
        TrainingError: a layer did not, though the module that it belongs to did.
    """
    found, silent, modules = Effect(), [], dict(walk(model))
    for path, host in hosts.items():
        if id(host) in ran or isinstance(host.base_layer, nn.ParameterList):
            found.reached.append(path)
            continue
        parent, several = path, False
        while parent and isinstance(modules[parent := parent.rpartition(".")[0]], CONTAINERS):
            several = True  # which of them runs is chosen
        if id(modules[parent]) in ran and not several:
            silent.append((path, type(inside(modules[parent])).__name__))
        else:
            found.waiting.append(path)
    if silent:
        raise TrainingError(reads_by_itself([path for path, _ in silent], silent[0][1]))
    return found


def reads_by_itself(paths: list[str], kind: str) -> str:
    """Says of layers that the module around the first, of this kind, runs without calling it."""
    path, more = paths[0], f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"the adapter at {path}{more} has no effect: {kind}, which it belongs to, ran and did "
        "not call it, so it reads the weight by itself. Adapt the parameter instead "
        f'(target_parameters=["{path.rpartition(".")[2]}.weight"]), or the module around it'
    )


def listed(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def without_gradient(what: str, bad: list[Named]) -> str:
    """Says what is wrong with the gradients of tensors, or of places."""
    names = [place if not key else f"{place}: {key}" for place, key in bad]
    return (
        f"{what}: {listed(names)}. Look at what the model does with that layer's output, at a loss "
        "that is not finite, or leave those layers out"
    )


def training(hosts: Mapping[str, Host], names: tuple[str, ...]) -> dict[Named, nn.Parameter]:
    """What trains and is read, by place and name: modules that a later part would read are idle at
    the last one.
    """
    idle: set[int] = set()
    for name in names:
        relays = [p for h in hosts.values() for _, p in h.parts_of(name) if p.relays][-1:]
        modules = (getattr(part, relay) for part in relays for relay in part.relays)
        idle |= {id(p) for module in modules for p in module.parameters()}
    return {
        (path, f"{name}.{key}"): p
        for path, host in hosts.items()
        for name in host.present(names)
        for key, p in host.adapters[name].named_parameters()
        if p.requires_grad and id(p) not in idle
    }


def _gradients(
    hosts: Mapping[str, Host], names: tuple[str, ...], outputs: Any, waiting: set[str]
) -> dict[Named, Tensor | None]:
    """The gradients of all tensors that train, by place and name."""
    trained = {n: p for n, p in training(hosts, names).items() if n[0] not in waiting}
    if not trained:
        return {}
    loss = getattr(outputs, "loss", None)
    floats = [t for t in tensors_in(outputs) if t.is_floating_point() and t.requires_grad]
    if not floats:
        raise TrainingError(
            "no gradient reaches the adapters: the outputs do not depend on any trainable tensor; "
            "look for torch.no_grad() or detach() in the model"
        )
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, generator=generator).to(t) for t in floats]
        loss = torch.stack([(t * w).sum().float() for t, w in zip(floats, weights, strict=True)])
    values = torch.autograd.grad(loss.sum(), list(trained.values()), allow_unused=True)
    return dict(zip(trained, values, strict=True))


def _judge(gradients: Mapping[Named, Tensor | None]) -> None:
    """Stop where a gradient is missing or no number, or where all at a place are zero."""
    places: dict[str, list[Tensor]] = {}
    for (place, _), g in gradients.items():
        places.setdefault(place, []).extend([] if g is None else [g])
    for what, bad in (
        ("what trains here gets no gradient", [n for n, g in gradients.items() if g is None]),
        (
            "what trains here gets a gradient that is not finite",
            [n for n, g in gradients.items() if g is not None and not g.isfinite().all()],
        ),
        (
            "what trains here gets a gradient of zeros alone",
            [(p, "") for p, own in places.items() if not any(bool(g.any()) for g in own)],
        ),
    ):
        if bad:
            raise TrainingError(without_gradient(what, bad))


def _change(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The largest difference that the adapters make to the outputs, without dropout."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            ours = tensors_in(model(*args, **kwargs))
            with model.disable_adapter():
                base = tensors_in(model(*args, **kwargs))
    finally:
        for module in training:
            module.training = True
    pairs = [(a, b) for a, b in zip(ours, base, strict=False) if a.is_floating_point()]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max([float((a.float() - b.float()).abs().max()) for a, b in pairs if a.numel()] or [0.0])
