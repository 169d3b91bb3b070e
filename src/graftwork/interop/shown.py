"""What torch asks a module for, answered in PEFT's names: ``named_modules()`` and with it
``named_parameters()``, ``state_dict()`` and ``load_state_dict()``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.host import Host
from ..engine.root import Grafted
from ..fast.tensors import lasting
from .tree import held, shape
from .views import Home, container


def _alone(shown: Any, name: str) -> Any:
    """A method in one process; among several the real tree is shown: torch's sharding puts other
    tensors in their owners' places, by the names that it has found before.
    """
    real = getattr(nn.Module, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (real if several else shown)(self, *args, **kwargs)

    return method


def named_modules(
    self: Host, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's modules at this layer, then this library's own."""
    memo = set() if memo is None else memo
    if self in memo:
        return
    if remove_duplicate:
        memo.add(self)
    front = f"{prefix}." if prefix else ""
    found = shape(self)
    yield prefix, found.module
    for name, child in found.children.items():
        yield from child.named_modules(memo, front + name, remove_duplicate)
    if remove_duplicate:
        memo.update(m for _, shared in held(self) for m in shared.modules())
        yield from self.adapters.named_modules(memo, f"{front}adapters", remove_duplicate)
        if found.module is not self:  # in whose place PEFT has the user's own layer
            yield f"{front}adapters.host", self


def state_dict(
    self: Host, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
) -> Any:
    """The tensors under PEFT's names; those that PEFT has no name for under their own."""
    if destination is None:
        destination = OrderedDict()
        destination._metadata = OrderedDict()
    found = shape(self)
    if found.module is not self:
        found.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
    else:
        for name, child in found.children.items():
            front = f"{prefix}{name}."
            child.state_dict(destination=destination, prefix=front, keep_vars=keep_vars)
    for name, tensor in lasting(self.adapters, "adapters."):
        if (
            name not in found.covered
            and name.rpartition(".module.")[0] + ".module" not in found.covered
        ):
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
    return destination


def load(self: Host, state: Any, prefix: str, *args: Any) -> None:
    """Take PEFT's names for this library's before the tensors are read."""
    found = shape(self)
    shown = {e.name: e for e in found.own}
    fronts = sorted({**found.base, **found.copies}.items(), key=lambda pair: -len(pair[0]))
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if name in shown:
            value, entry = state.pop(key), shown[name]
            if entry.inner is not None:
                state[prefix + entry.inner] = value
            elif entry.home is not None:  # kept at another layer
                with torch.no_grad():
                    entry.tensor.copy_(value)
        elif not name.startswith("adapters."):
            own = next((_moved(name, *pair) for pair in fronts if _under(name, pair[0])), name)
            state[prefix + own] = state.pop(key)
    for own in found.hidden:
        owner, _, leaf = own.rpartition(".")
        state.setdefault(prefix + own, getattr(self.get_submodule(owner), leaf))
    nn.Module._load_from_state_dict(self, state, prefix, *args)


def _under(name: str, front: str) -> bool:
    return not front or name == front or name.startswith(f"{front}.")


def _moved(name: str, front: str, own: str) -> str:
    return f"{own}.{name}" if not front else own + name[len(front) :]


ROOTS = {  # what PEFT keeps once for the whole model: attribute -> its letter
    name: kind
    for kind, names in {
        "B": "frod_V frod_s_indices frod_s_size pvera_A pvera_B randlora_A randlora_B vera_A "
        "vera_B",
        "P": "unilora_theta_d vblora_vector_bank",
        "M": "tinylora_v",
    }.items()
    for name in names.split()
}


def roots(root: Grafted) -> dict[str, nn.Module]:
    """The containers of what PEFT keeps once for the whole model."""
    found: dict[str, dict[str, dict[str, tuple[Tensor, Home | None]]]] = {}
    for name, shared in root.switch.shared.items():
        for local, tensor in lasting(shared):
            attribute, _, rest = shared.keys.get(local, "").partition(".")
            if attribute in ROOTS and attribute.startswith("frod_"):  # by layer, then by adapter
                own = found.setdefault(attribute, {}).setdefault(rest, {})
                own[name] = tensor, (shared, local)
            elif attribute in ROOTS:
                own = found.setdefault(attribute, {}).setdefault(name, {})
                own[rest] = tensor, (shared, local)
    return {a: container(ROOTS[a], a, own, None) for a, own in found.items()}


def root_modules(
    self: Grafted,
    memo: set[nn.Module] | None = None,
    prefix: str = "",
    remove_duplicate: bool = True,
) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's modules of a tuner: the model, and what is kept once for it."""
    memo = set() if memo is None else memo
    if self not in memo:
        yield from nn.Module.named_modules(self, memo, prefix, remove_duplicate)
        for name, module in roots(self).items():
            yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name)


def root_state(
    self: Grafted, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
) -> Any:
    """The model's tensors, and what is kept once for it."""
    out = nn.Module.state_dict(
        self, *args, destination=destination, prefix=prefix, keep_vars=keep_vars
    )
    for name, module in roots(self).items():
        module.state_dict(destination=out, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
    return out


def root_load(self: Grafted, state: Any, prefix: str, *args: Any) -> None:
    """Take what is kept once for the model."""
    for name, module in roots(self).items():
        for key, mine in module.state_dict(keep_vars=True).items():
            if (full := f"{prefix}{name}.{key}") in state:
                with torch.no_grad():
                    mine.copy_(state.pop(full))
    nn.Module._load_from_state_dict(self, state, prefix, *args)


def install() -> None:
    """Show PEFT's tree from now on."""
    for kind, methods in {
        Host: {
            "named_modules": named_modules,
            "state_dict": state_dict,
            "_load_from_state_dict": load,
        },
        Grafted: {
            "named_modules": root_modules,
            "state_dict": root_state,
            "_load_from_state_dict": root_load,
        },
    }.items():
        for name, method in methods.items():
            setattr(kind, name, _alone(method, name))
