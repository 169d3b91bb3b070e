"""What was computed from tensors is kept for as long as they are what they were."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .stack import Stacks

TWIN = "held_scale"  # the same as the number beside it
HELD = 2  # results at one layer: one for prompts, one for the tokens that follow


_version, _address = attrgetter("_version"), Tensor.data_ptr


class Watch:
    """Whether some dictionaries hold the same values as when they were shown.

    Tensors are the same while object, version and address are: the version counts what is written
    into a tensor, the address changes where ``.data`` gets another one, as in a move. A write
    through ``.data`` into the same memory leaves no trace that could be seen.
    """

    hooked: list[Any] = []  # into the steps of all optimizers, from the first watch on

    def __init__(self) -> None:
        if not Watch.hooked:
            Watch.hooked.append(register_optimizer_step_post_hook(_count))
        self.holders: list[dict[Any, Any]] = []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self.hooks: list[Any] = []
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        self.addresses: list[int] = []
        self.alive: list[Tensor] = []  # so that no other tensor gets the same address
        self.usable = True  # False: a tensor does not tell whether it was written to

    def value(self, holder: dict[Any, Any], key: Any) -> None:
        """Watch one entry of a dictionary; None is one that is not there."""
        value = holder.get(key)
        self.holders.append(holder)
        self.keys.append(key)
        self.values.append(value)
        if isinstance(value, Tensor):
            self.tensor(value)

    def tensor(self, tensor: Tensor) -> None:
        """Watch a tensor's contents."""
        if tensor.is_meta or tensor.is_inference() or not tensor.data_ptr():
            self.usable = self.usable and not tensor.numel()
        self.alive.append(tensor.detach())
        self.tensors.append(tensor)
        self.addresses.append(tensor.data_ptr())
        self.versions.append(0 if tensor.is_inference() else tensor._version)

    def module(self, module: nn.Module) -> None:
        """Watch a module's tensors, its switches and factors, its children and its hooks."""
        for own in module.modules():
            if type(own) is nn.Identity:
                continue  # a dropout of 0, which has nothing to watch
            for holder in (own._parameters, own._buffers, own._modules):
                for key in holder:
                    self.value(holder, key)
            if type(own) is nn.ModuleDict:
                continue  # holds parts, and is never called
            for key, value in own.__dict__.items():
                if isinstance(value, (bool, float, Tensor)) and key != TWIN:
                    self.value(own.__dict__, key)
            self.hooks += [own._forward_hooks, own._forward_pre_hooks]

    def same(self) -> bool:
        """Whether every value is the object that it was, and no module has hooks."""
        now = map(dict.get, self.holders, self.keys)
        return all(map(is_, now, self.values)) and not any(self.hooks)

    def unwritten(self) -> bool:
        """Whether nothing was written into the tensors."""
        now = list(map(_version, self.tensors))
        return now == self.versions and list(map(_address, self.tensors)) == self.addresses

    def learns(self) -> bool:
        """Whether a tensor wants a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)


def _count(optimizer: Optimizer, *_: Any) -> None:
    """Count what torch's fused optimizers have written, which they do not themselves."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if p.grad is not None])


class Kept:
    """The last few results with what they were computed from; a copy of it is empty."""

    def __init__(self) -> None:
        self.results: dict[Hashable, tuple[Watch, Any]] = {}
        self.stacks: Stacks | None = None  # in which the factors of the layer are while they learn

    def lie(self, stacks: Stacks | None) -> None:
        """From now on the factors that learn lie in these, or in none."""
        self.stacks = stacks
        self.results.clear()

    def find(self, key: Hashable) -> tuple[Watch, Any] | None:
        """What is kept under a key, where it was computed from the objects that are there now."""
        found = self.results.get(key)
        if found is not None and not found[0].same():
            self.results.pop(key, None)
            return None
        return found

    def put(self, key: Hashable, watch: Watch, result: Any) -> None:
        """Keep a result, and drop the oldest."""
        self.results.pop(key, None)
        self.results[key] = watch, result
        for oldest in tuple(self.results)[:-HELD]:  # threads may do so at once
            self.results.pop(oldest, None)

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def numel(modules: Iterable[nn.Module]) -> int:
    """How many numbers modules hold."""
    return sum(t.numel() for m in modules for own in (m.parameters(), m.buffers()) for t in own)
