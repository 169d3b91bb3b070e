"""Layer replication: blocks that a model runs several times, each time with adapters of its own.

``layer_replication=[[0, 4], [2, 5]]`` makes of five blocks the seven 0 1 2 3 2 3 4. A later
occurrence is a copy of the module that has the same tensors. What runs without an adapter runs the
blocks that were there, in their order.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..engine.switch import BASE, Switch
from ..engine.tree import inside, put, walk
from ..errors import StateError, TargetError

FIELD = "layer_replication"
DEEPEST = 1024  # blocks; each is a module of its own
NOBODY = ("",)  # active where the repeated blocks are to run, with no adapter in them
KINDS = "layer_types"  # a model of several kinds of blocks says so in its config, by position


class Replicas(nn.ModuleList):
    """Stands where a list of blocks stood: those that ``order`` names, then those that it leaves
    out. Which of them it shows depends on what is active.
    """

    def __init__(self, blocks: nn.ModuleList, order: list[int], switch: Switch) -> None:
        super().__init__()
        left = [i for i in range(len(blocks)) if i not in order]
        every = order + left
        self.depth, self.sources, self.switch = len(order), every, switch
        self.firsts = [every.index(i) for i in range(len(blocks))]
        self.blocks = (blocks,)  # in a tuple: no child, since its modules are children here
        for i, source in enumerate(every):
            block = blocks[source]
            self.add_module(str(i), block if i in self.firsts else _sharing(block))
        # a cache has a place for each block that is there, whether it runs or not
        self.places = [(m, m.layer_idx) for m in blocks.modules() if "layer_idx" in vars(m)]
        for i, block in enumerate(self._modules.values()):
            _settle_at(i, block)
        self.config: Any = None
        self.before: dict[str, Any] = {}

    def now(self) -> list[nn.Module]:
        """The blocks that run here and now.

        Raises:
            StateError: some rows of the batch want all of them, and some those of the base.
        """
        every: list[Any] = list(self._modules.values())
        call = self.switch.current()
        names = set(call.rows or call.active)
        if BASE in names and len(names) > 1:
            raise StateError(
                f"rows of {BASE!r} cannot be in a batch with others here: {FIELD} makes the model "
                "deeper for them. Run the base model by itself, with disable_adapter()"
            )
        return every[: self.depth] if names - {BASE} else [every[i] for i in self.firsts]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.now())

    def __len__(self) -> int:
        return len(self.now())

    def __getitem__(self, index: Any) -> Any:
        found = self.now()[index]
        return nn.ModuleList(found) if isinstance(index, slice) else found

    def spare(self) -> list[str]:
        """The names of the blocks that adapters do not run."""
        return list(self._modules)[self.depth :]

    def tell(self, config: Any) -> None:
        """Write the new depth into a model's config.

        Raises:
            TargetError: the base model would find blocks of another kind at its positions.
        """
        self.config, n = config, len(self.firsts)
        own = {k: v for k, v in vars(config).items() if k.endswith(KINDS) and len(v or ()) == n}
        self.before = {"num_hidden_layers": config.num_hidden_layers, **own}
        new = {name: [kinds[i] for i in self.sources] for name, kinds in own.items()}
        if KINDS in own and new[KINDS][:n] != list(own[KINDS]):
            raise TargetError(
                f"the blocks of this model are of several kinds ({KINDS} of its config), and "
                f"{FIELD} would put blocks of another kind at the positions of the base model; "
                "repeat whole periods of them, such as 0 to 4 where every second one differs"
            )
        self.write({**new, "num_hidden_layers": len(self._modules)})

    def write(self, values: dict[str, Any]) -> None:
        """Change the model's config, where it has one that says how deep it is."""
        for name, value in values.items() if self.config is not None else ():
            setattr(self.config, name, value)

    def restored(self) -> nn.ModuleList:
        """The list that was there, with its blocks as they are now."""
        (blocks,) = self.blocks
        for i, first in enumerate(self.firsts):
            blocks._modules[str(i)] = self._modules[str(first)]
        for module, place in self.places:
            module.layer_idx = place
        self.write(self.before)
        return blocks

    def parted(self) -> nn.ModuleList:
        """A plain list as deep as this one, in which no two blocks have a tensor in common."""
        every: list[Any] = list(self._modules.values())[: self.depth]
        for i, (source, block) in enumerate(zip(self.sources, every, strict=False)):
            if i != self.firsts[source]:
                every[i] = block = copy.deepcopy(block)
                first = every[self.firsts[source]]
                for p, q in zip(block.parameters(), first.parameters(), strict=True):
                    p.requires_grad_(q.requires_grad)
            _settle_at(i, block)
        order = self.sources[: self.depth]
        kinds = {k: [v[i] for i in order] for k, v in self.before.items() if k.endswith(KINDS)}
        self.write({**kinds, "num_hidden_layers": self.depth})
        return nn.ModuleList(every).train(self.training)


def _sharing(block: nn.Module) -> nn.Module:
    """A copy of a module with the same tensors."""
    tensors = itertools.chain(block.parameters(), block.buffers())
    return copy.deepcopy(block, {id(t): t for t in tensors})


def _settle_at(place: int, block: nn.Module) -> None:
    """Tell a block its place in a cache, in transformers' way."""
    for module in block.modules():
        if "layer_idx" in vars(module):
            module.layer_idx = place  # type: ignore[assignment]


def order_of(config: Any) -> list[int]:
    """The numbers of the blocks that a config makes a model run; none: those that it has.

    Raises:
        TargetError: they are far too many.
    """
    pairs = getattr(config, FIELD, None) or ()
    if (deep := sum(end - start for start, end in pairs)) > DEEPEST:
        raise TargetError(f"{FIELD} makes a model of {deep} blocks, and {DEEPEST} are the most")
    return [n for pair in pairs for n in range(*pair)]


@contextmanager
def replicated(model: nn.Module, config: Any, switch: Switch) -> Iterator[None]:
    """Within the block a model has the blocks that a new adapter asks for; unless that fails, it
    keeps them.

    Raises:
        StateError: its other adapters ask for others.
        TargetError: the model has not just one list of blocks, or too few of them.
    """
    order = order_of(config)
    for name, other in itertools.islice(switch.configs.items(), 1):  # all agree with the first
        if order_of(other) != order:
            theirs, mine = getattr(other, FIELD, None), getattr(config, FIELD, None)
            raise StateError(
                f"the adapter {name!r} has {FIELD}={theirs} and the new one {mine}: all adapters "
                "of a model run through the same blocks. Give both the same, or each its own model"
            )
    new = bool(order) and not switch.configs
    try:
        if new:
            _replicate(model, order, switch)
        yield
    except BaseException:
        if new:
            restore(model)
        raise


def _replicate(model: nn.Module, order: list[int], switch: Switch) -> None:
    path, blocks = _blocks(model)
    if max(order) >= len(blocks):
        raise TargetError(
            f"{FIELD} names block {max(order)}, and {path} has the blocks 0 to {len(blocks) - 1}"
        )
    replicas = Replicas(blocks, order, switch)
    put(model, path, replicas)
    above = [module for p, module in walk(model) if not p or path.startswith(f"{p}.")]
    configs = [getattr(inside(module), "config", None) for module in above]
    if known := [config for config in configs if hasattr(config, "num_hidden_layers")]:
        replicas.tell(known[-1])


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """A model's list of blocks: the only list of modules that have modules in them."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in walk(model):
        listed = inside(module)
        deep = [any(True for _ in child.children()) for child in listed.children()]
        if isinstance(listed, nn.ModuleList) and deep and all(deep):
            if not path.startswith(tuple(f"{p}." for p in found)):  # no list of experts in a block
                found[path] = listed
    if len(found) != 1:
        has = f"has several, {sorted(found)}" if found else "has none"
        raise TargetError(
            f"{FIELD} needs a model with one list of blocks, and {type(model).__name__} {has}"
        )
    return next(iter(found.items()))


def there(model: nn.Module) -> dict[str, Replicas]:
    """The replicated list of a model, if it has one, by its path."""
    found = ((path, inside(module)) for path, module in walk(model))
    return {path: module for path, module in found if isinstance(module, Replicas)}


def restore(model: nn.Module) -> dict[str, Replicas]:
    """Give a model back the blocks that it had; also what stood there instead."""
    replaced = there(model)
    for path, replicas in replaced.items():
        put(model, path, replicas.restored())
    return replaced
