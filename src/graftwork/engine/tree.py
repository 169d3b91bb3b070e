"""The user's model as it was before any host: its modules and parameters by original name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..fast.shards import TRANSPARENT
from .host import Host

# the wrappers of torch: a module of the user's may have a child of such a name too
WRAPPERS = ("torch._dynamo", "torch.distributed")


def inside(module: nn.Module) -> nn.Module:
    """The user's module, without hosts and torch's wrappers around it."""
    while True:
        children: Any = module._modules
        if isinstance(module, Host):
            module = children["base_layer"]
            continue
        for name in TRANSPARENT if children else ():
            if name in children and type(module).__module__.startswith(WRAPPERS):
                module = children[name]
                break
        else:
            return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by original path, hosts standing for layers; a shared module at each path."""
    waiting = [(path, module)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        children, front = inside(module)._modules, f"{path}." if path else ""
        waiting += [(front + n, m) for n, m in reversed(children.items()) if m is not None]


def hosts(module: nn.Module) -> dict[str, Host]:
    """The hosts of a model by original path; one that stands at several paths comes once."""
    found: dict[int, tuple[str, Host]] = {}
    for path, m in walk(module):
        if isinstance(m, Host):
            found.setdefault(id(m), (path, m))
    return dict(found.values())


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of all adapters with the adapters' names."""
    for host in hosts(model).values():
        for name, own in host.adapters._modules.items():
            yield from ((name, part) for part in own.children())


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Make ``module`` the child at an original path."""
    parent_path, _, name = path.rpartition(".")
    parent = inside(model)
    for part in parent_path.split(".") if parent_path else ():
        parent = inside(parent._modules[part])  # type: ignore[arg-type]
    parent._modules[name] = module  # as setattr would, also for names that are no identifiers


def parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The user's own parameters by original name, as they were before any merging."""
    for path, module in walk(model):
        originals = module.originals if isinstance(module, Host) else {}
        for name, parameter in inside(module)._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, originals.get(name, parameter)


def mark(tensor: Tensor) -> Any:
    """The same value for two references to the same numbers, by identity or by storage."""
    address = 0 if tensor.is_meta else tensor.data_ptr()
    return (address, tensor.device, tensor.shape) if address else id(tensor)
