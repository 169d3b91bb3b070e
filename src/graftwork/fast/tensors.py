"""The tensors of modules: which there are, and where and how new ones are made."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def lasting(module: nn.Module, front: str = "") -> Iterator[tuple[str, Tensor]]:
    """A module's tensors by name, those of ``state_dict(keep_vars=True)`` without its detours."""
    passing = module._non_persistent_buffers_set
    buffers = ((n, t) for n, t in module._buffers.items() if n not in passing)
    for name, tensor in itertools.chain(module._parameters.items(), buffers):
        if tensor is not None:
            yield front + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from lasting(child, f"{front}{name}.")


def is_all(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all floating-point tensors of a module are of this type already."""
    for m in module.modules():
        for t in itertools.chain(m._parameters.values(), m._buffers.values()):
            if t is not None and t.is_floating_point() and t.dtype != dtype:
                return False
    return True


def owner_of(module: nn.Module, dotted: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and the parameter's own name."""
    owner, _, leaf = dotted.rpartition(".")
    return module.get_submodule(owner), leaf


def brings(module: nn.Module) -> Any:
    """accelerate's hook that brings a module's tensors from elsewhere for each of its forwards,
    where it has one; between them they are on meta.
    """
    hook = module.__dict__.get("_hf_hook")
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)), None)


def fetched(owner: nn.Module, name: str) -> Tensor:
    """A tensor of a module, from where it is offloaded to if it is."""
    tensor: Tensor = getattr(owner, name)
    if tensor.is_meta and (hook := brings(owner)):
        tensor = hook.weights_map[name].to(hook.execution_device)
    return tensor


def unwritable(owner: nn.Module, weight: Tensor) -> str:
    """Why a merged weight cannot stand in a module for this one, and what to do; or nothing."""
    if brings(owner):
        return (
            "is offloaded, and what is written there would be overwritten from its copy; merge the "
            "base model's files instead"
        )
    if not weight.is_floating_point():
        return (
            f"is packed ({weight.dtype}), and rounding the sum to that would lose the update; "
            "merge into the files of the model that it was quantised from"
        )
    return ""


VALUES = frozenset((bool, int, float, str, tuple))


def stay(module: nn.Module) -> None:
    """Bring a module's own tensors back from where they are offloaded to, for good: whoever reads
    them does not run its forward.
    """
    if not (hook := brings(module)):
        return
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None and tensor.is_meta and name in hook.weights_map:
                here = hook.weights_map[name].detach().to(hook.execution_device)
                parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(here, tensor.requires_grad) if parameter else here
    hook.offload = False


def kept(module: nn.Module, name: str, value: Any) -> bool:
    """Set an attribute that is a plain value, as ``nn.Module`` does, without its many questions: an
    adapter has a dozen at each layer. False: it is for ``nn.Module``.
    """
    own = module.__dict__
    tables = own["_parameters"], own["_buffers"], own["_modules"]
    if type(value) not in VALUES or name in tables[0] or name in tables[1] or name in tables[2]:
        return False
    object.__setattr__(module, name, value)
    return True


class Staying:
    """accelerate's hook of a module, which offloads its tensors and brings them back for a forward
    alone: where it is set, they stay.
    """

    def __get__(self, module: Any, kind: type | None = None) -> Any:
        if module is None or "_hf_hook" not in module.__dict__:
            raise AttributeError("_hf_hook")
        return module.__dict__["_hf_hook"]

    def __set__(self, module: Any, hook: Any) -> None:
        module.__dict__["_hf_hook"] = hook
        stay(module)

    def __delete__(self, module: Any) -> None:
        del module.__dict__["_hf_hook"]


def settled(module: nn.Module) -> nn.Module:
    """A module of an adapter, whose tensors stay where they are."""
    for m in module.modules():
        stay(m)
    return module


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module that has its own tensors, also where the module's are offloaded."""
    hooks = [hook for m in module.modules() if (hook := brings(m))]
    kept = {id(m): m for hook in hooks for m in (hook.weights_map, hook.tied_params_map)}
    return settled(copy.deepcopy(module, kept))


def first(layer: nn.Module) -> Tensor | None:
    """A tensor of a layer, which says where and in which precision it computes."""
    own = (p for p in layer._parameters.values() if p is not None)
    return next(itertools.chain(own, layer.parameters()), None)


def device_of(layer: nn.Module) -> torch.device:
    """Where what is new at a layer is made."""
    tensor = first(layer)
    if tensor is not None and tensor.is_meta and (hook := brings(layer)):
        return torch.device(hook.execution_device)
    return torch.get_default_device() if tensor is None else tensor.device


def dtype_of(layer: nn.Module, wide: bool) -> torch.dtype:
    """The precision of a layer; ``wide``: fp32 at least."""
    tensor = first(layer)
    dtype = tensor.dtype if tensor is not None and tensor.is_floating_point() else torch.float32
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def no_autocast(module: nn.Module) -> Any:
    """A context without autocast on the module's device: folding a weight is exact work."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@contextmanager
def making(device: torch.device) -> Iterator[None]:
    """Within the block new tensors are fp32 and on this device, whatever the program's defaults
    are; nothing is recorded or cast.
    """
    meta, before = device.type == "meta", torch.get_default_dtype()
    exact = nullcontext() if meta else torch.autocast(device.type, enabled=False)
    # a device's context slows every call of torch within it down
    there = nullcontext() if torch.get_default_device() == device else device
    torch.set_default_dtype(torch.float32)
    try:
        with there, torch.no_grad(), exact:
            yield
    finally:
        torch.set_default_dtype(before)


def to_meta(module: nn.Module) -> None:
    """Leave parameters without memory: their values will follow."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give parameters without memory some, not filled."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None and p.is_meta:
                empty = torch.empty_like(p, device=device)
                m._parameters[name] = nn.Parameter(empty, p.requires_grad)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in ``dtype`` where both are floating point; None leaves it."""
    return x.to(dtype) if dtype is not None and x.is_floating_point() and x.dtype != dtype else x


@contextmanager
def steady(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block nothing is dropped: what is written or reported is the update itself."""
    training = [part for part in parts if part.training]
    for part in training:
        part.eval()
    try:
        yield
    finally:
        for part in training:
            part.train()
