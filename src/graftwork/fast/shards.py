"""Tensors that several processes hold in parts: FSDP's, tensor parallel ones, and ZeRO-3's.

What is read from such a model outside a forward, or written into it, goes through ``whole``: each
process has the whole tensors for a moment, and all processes have to take part. Where that cannot
be done, it is refused: a part is never taken for the whole.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError

# children through which torch wraps a module: the path of what is inside is the path of the whole
TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# who has not imported these has no such tensors and modules
TENSOR, FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"


def split(tensor: Any) -> str | None:
    """How a tensor is held in parts, in words; None for a whole one."""
    if (home := sys.modules.get(TENSOR)) and isinstance(tensor, home.DTensor):
        return f"a DTensor with the placements {tensor.placements}"
    full = getattr(tensor, "ds_shape", None)
    if full is not None and tuple(full) != tuple(tensor.shape):
        return "partitioned by DeepSpeed's ZeRO-3"
    return None


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def gather(name: str, tensor: Tensor) -> Tensor:
    """The whole tensor, without its history; every process that holds a part has to ask for it.

    Raises:
        StateError: nobody here can gather it.
    """
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return whole
    if split(tensor) is None:
        return tensor.detach()
    with _deepspeed(name).GatheredParameters([tensor], modifier_rank=None):
        return tensor.detach().clone()


PLANS = ("_hf_tp_plan", "_tp_info")  # how transformers marks modules that are tensor parallel


def may_be_parted(modules: Sequence[nn.Module]) -> bool:
    """Whether to look at each of these modules before it is adapted."""
    return sharding(modules) or any(n in module.__dict__ for module in modules for n in PLANS)


def parts_in(modules: Iterable[nn.Module]) -> str | None:
    """What modules hold in parts, in words; None where it is nothing."""
    for module in modules:
        plan = next(filter(None, (getattr(module, name, None) for name in PLANS)), None)
        if plan:
            return f"the module is tensor parallel ({plan})"
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if (how := split(tensor)) is not None:
                return f"{name} is {how}"
    return None


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a model, and not the one that fully_shard makes of it."""
    made: Any = getattr(sys.modules.get(FSDP), "FSDPModule", ())
    return next(c for c in type(model).__mro__ if not made or not issubclass(c, made))


def sharding(modules: Iterable[nn.Module] = ()) -> bool:
    """Whether this program can hold anything in parts at all, or these modules."""
    first = next((p for module in modules for p in module.parameters()), None)
    return meeting() or hasattr(first, "ds_shape")  # which ZeRO-3 gives to each


def gathers(model: nn.Module) -> bool:
    """Whether processes have to do it together, where a model's tensors are read."""
    return first_generation(model) or any(map(split, model.parameters()))


def meeting() -> bool:
    """Whether this process has to do with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """The number of this process."""
    return torch.distributed.get_rank() if meeting() else 0


def readable_now(module: Any) -> Any:
    """A module as a forward elsewhere in the model can read it: FSDP gathers tensors for the block
    in which they are, and others find parts. Those are gathered here, and what comes back is the
    mean of all processes' gradients, as FSDP has it.
    """
    if torch.compiler.is_compiling() or module is None or not meeting():
        return module
    whole = {n: _gathered(p) for n, p in module._parameters.items() if split(p)}
    inner = {n: readable_now(m) for n, m in module._modules.items()}
    if not whole and all(m is module._modules[n] for n, m in inner.items()):
        return module
    new = copy.copy(module)
    new.__dict__["_parameters"] = {**module._parameters, **whole}
    new.__dict__["_modules"] = inner
    return new


def _gathered(tensor: Any) -> Tensor:
    from torch.distributed.tensor import Partial

    if not hasattr(tensor, "full_tensor"):
        return tensor  # type: ignore[no-any-return]  # ZeRO-3's, which its engine gathers
    mean = [Partial("avg") for _ in range(tensor.device_mesh.ndim)]
    whole: Tensor = tensor.full_tensor(grad_placements=mean)
    return whole


def in_parts(where: str, how: str, done: str) -> StateError:
    """The error of what needs a whole layer.

    Args:
        where: the layer's path.
        how: in which way it is held in parts.
        done: what was to be done with it, as "merged".
    """
    return StateError(
        f"{where} cannot be {done} here, since processes hold it in parts: {how}. Attach adapters "
        "to the whole model, and shard it with them (fully_shard, accelerate's prepare); to merge "
        "or to convert them, save them, and load them into a model in one process, or use "
        "`graft merge`"
    )


@contextmanager
def readable(layer: nn.Module, where: str) -> Iterator[None]:
    """Within the block parts of an adapter can be made for a layer: ZeRO-3's tensors are gathered,
    where it is there; what never is whole is refused.

    Args:
        layer: the layer.
        where: its path.

    Raises:
        StateError: processes hold it in parts.
    """
    zero = [p for p in layer.parameters() if hasattr(p, "ds_shape") and split(p)]
    if not zero:
        if how := parts_in([layer]):
            raise in_parts(where, how, "adapted")
        yield
    elif "deepspeed" in sys.modules:
        with _deepspeed(where).GatheredParameters(zero, modifier_rank=None):
            yield
    else:
        yield


def first_generation(model: nn.Module) -> bool:
    """Whether a model is sharded by FullyShardedDataParallel, which flattens what it holds."""
    home = sys.modules.get(FSDP) if meeting() else None
    return home is not None and any(
        isinstance(m, home.FullyShardedDataParallel) for m in model.modules()
    )


@contextmanager
def whole(
    model: nn.Module | None,
    modules: Iterable[nn.Module],
    values: Mapping[str, Tensor] | None = None,
    write: bool = False,
) -> Iterator[None]:
    """Within the block modules hold whole tensors, where processes hold parts of them.

    Args:
        model: in which the modules are; None within an optimizer's step: then gradients too are
            gathered and written.
        modules: what is to be whole, with all that is in them.
        values: the model's whole tensors by name, where somebody has gathered them; then no other
            process is asked.
        write: whether what is in the tensors at the end goes back into the parts.

    Raises:
        StateError: a tensor is in parts that nobody here can gather.
    """
    every = {id(inner): inner for module in modules for inner in module.modules()}
    with ExitStack() as stack:
        if values is None and model is not None:
            _settle(stack, model, write)
        tables: list[dict[str, Any]] = []
        for inner in every.values():
            tables += [inner._parameters, inner._buffers]
        before = [dict(table) for table in tables]
        try:
            if values is not None and model is not None:
                _place(model, every, values)
            _fill(tables, values is not None, stack, write)
            for table, old in zip(tables, before, strict=True) if model is None else ():
                for name, tensor in old.items():
                    if table[name] is not tensor and tensor.grad is not None:
                        table[name].grad = gather(name, tensor.grad)
            yield
            for table, old in zip(tables, before, strict=True) if write else ():
                for name, tensor in old.items():
                    if hasattr(tensor, "full_tensor") and table[name] is not tensor:
                        _write(tensor, table[name])
                        if model is None:
                            _write_grad(tensor, table[name])
        finally:
            for table, old in zip(tables, before, strict=True):
                for name in [n for n in table if n not in old]:
                    del table[name]
                for name, tensor in old.items():
                    if split(tensor) or values is not None:
                        table[name] = tensor


def _fill(tables: list[dict[str, Any]], given: bool, stack: ExitStack, write: bool) -> None:
    """Put whole tensors in the places of parts."""
    partitioned: list[Tensor] = []
    for table in tables:
        for name, tensor in table.items():
            how = split(tensor)
            if how is not None and given:
                raise StateError(
                    f"{name} is {how}, and the state_dict that was given lacks it: give that of "
                    "the whole model, or call this without one in every process"
                )
            if how is not None and not hasattr(tensor, "full_tensor"):
                partitioned.append(tensor)
            elif how is not None:
                table[name] = _like(tensor, gather(name, tensor))
    if partitioned:
        zero = _deepspeed(f"{len(partitioned)} tensors").GatheredParameters
        stack.enter_context(zero(partitioned, modifier_rank=0 if write else None))


def _place(model: nn.Module, every: dict[int, nn.Module], values: Mapping[str, Tensor]) -> None:
    """Put tensors of a state dict of the model in their places in some of its modules."""
    keys: dict[str, list[tuple[str, Tensor]]] = {}
    for key, value in values.items():
        owner, _, leaf = key.rpartition(".")
        keys.setdefault(plain_path(owner), []).append((leaf, value))
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, value in keys.get(plain_path(path), ()) if id(module) in every else ():
            table = module._buffers if leaf in module._buffers else module._parameters
            table[leaf] = _like(table.get(leaf, nn.Parameter(value)), value)


def plain_path(path: str) -> str:
    """A module's path without torch's wrappers."""
    return ".".join(part for part in path.split(".") if part not in TRANSPARENT)


def _like(old: Any, new: Tensor) -> Tensor:
    """``new`` as a parameter where ``old`` is one."""
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _part_of(like: Any, whole: Tensor) -> Any:
    """In parts like another tensor, what all processes have as a whole."""
    from torch.distributed.tensor import distribute_tensor

    options: Any = {"src_data_rank": None}  # nobody sends: each has it
    return distribute_tensor(whole.detach(), like.device_mesh, like.placements, **options)


@torch.no_grad()
def _write(part: Any, whole: Tensor) -> None:
    """Write this process's part of a tensor that all processes have as a whole."""
    part.to_local().copy_(_part_of(part, whole).to_local())


def _write_grad(part: Any, whole: Tensor) -> None:
    part.requires_grad_(whole.requires_grad)
    part.grad = None if whole.grad is None else _part_of(part, whole.grad)


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Write whole values into a tensor, or each process its part of them."""
    if hasattr(tensor, "full_tensor"):
        _write(tensor, whole.to(tensor.device, tensor.dtype))
    elif how := split(tensor):
        raise StateError(f"a weight of the base model that the file holds is {how}; load it whole")
    else:
        tensor.copy_(whole)


def _settle(stack: ExitStack, model: nn.Module, write: bool) -> None:
    """Let FSDP hold its parts, and not what it had gathered for a forward."""
    home = sys.modules.get(FSDP)
    if home is None:
        return
    if first_generation(model):
        every = home.FullyShardedDataParallel.summon_full_params
        stack.enter_context(every(model, writeback=write))
    for module in model.modules():
        if isinstance(module, home.FSDPModule):
            module.reshard()


def _deepspeed(name: str) -> Any:
    try:
        import deepspeed  # type: ignore[import-not-found]
    except ImportError:
        raise StateError(
            f"{name}: partitioned by DeepSpeed's ZeRO-3, and deepspeed cannot be imported to "
            "gather it. Do this within deepspeed.zero.GatheredParameters(model.parameters()), or "
            "give the state_dict that the engine has gathered"
        ) from None
    return deepspeed.zero
