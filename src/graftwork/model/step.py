"""What is seen of one training step: which layers run, what the outputs depend on, where gradients
arrive, and whether they are numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..engine.host import NAMES, Host
from ..engine.site import Embedding
from ..engine.tree import hosts, inside, walk
from ..errors import POLICY, TrainingError, warn
from ..fast.plain import PLAIN
from ..fast.rows import tensors_in
from .effect import CONTAINERS, Named, listed, reads_by_itself, training, without_gradient
from .fresh import running_statistics, untrained_heads

if TYPE_CHECKING:
    from .canary import Canary

PATIENCE = 16  # watched forwards in a row without any backward, after which no more are
OPEN: weakref.WeakSet[Step] = weakref.WeakSet()  # steps that an optimizer ends
_READ: list[set[int]] = []  # of forwards that are watched now: layers whose weights were read
_SHOWN: list[Callable[[Host], Any] | None] = []  # what shows a layer's weight otherwise
_HOOKED: list[Any] = []


class Step:
    """What is seen of one training step.

    Args:
        canary: whose it is.
        model: the user's model.
        names: the adapters that it trains.
    """

    def __init__(self, canary: Canary, model: nn.Module, names: tuple[str, ...]) -> None:
        self.canary, self.model, self.names = canary, model, names
        self.hosts = {p: h for p, h in hosts(model).items() if h.present(names)}
        self.parents = _parents(model, self.hosts)
        self.trained = training(self.hosts, names)
        self.ran: set[int] = set()
        self.read: set[int] = set()
        self.depends: set[int] | None = set()  # what outputs depend on; None: it cannot be seen
        self.arrived: set[Named] = set()
        self.finite: dict[Named, Tensor] = {}
        self.forwards, self.steps, self.waited = 0, 0, 0
        self.zero: set[str] = set()
        self.said: set[str] = set()
        self.inside = self.called = self.scaled = self.settled = False
        self.handles: list[Any] = []
        self.listening: list[Any] = []
        if not self.trained:
            return
        self._first()
        for named, tensor in self.trained.items():
            hook = tensor.register_hook(partial(self._arrive, named))  # type: ignore[no-untyped-call]
            self.listening.append(hook)
        OPEN.add(self)
        if not _HOOKED:
            _HOOKED.append(register_optimizer_step_pre_hook(_before_step))

    def _first(self) -> None:
        """What can be said before anything runs."""
        if heads := untrained_heads(self.model, self.names):
            self.complain(heads)
        if text := running_statistics(self.model, self.names):
            warn(text)

    # -- the forward

    def watch(self) -> None:
        """Watch the forward that begins."""
        if not any(tensor.requires_grad for tensor in self.trained.values()):
            return  # or no more: they may have been frozen since
        self.inside, self.forwards = True, self.forwards + 1
        self.scaled = self.scaled or _half(self.model)
        around = [module for module, _ in self.parents.values()]
        for module in {
            id(m): m for m in (*(self.hosts[path] for path in self.parents), *around)
        }.values():
            self.handles.append(module.register_forward_pre_hook(self._note))
        _READ.append(self.read)
        if NAMES.get("weight") is not _reading:
            _SHOWN[:], NAMES["weight"] = [NAMES.get("weight")], _reading
        hook = self.model.register_forward_hook(self._ended, always_call=True)
        self.handles.append(hook)

    def _note(self, module: nn.Module, _: Any) -> None:
        self.ran.add(id(module))

    def _ended(self, module: nn.Module, _: Any, outputs: Any) -> None:
        self._stop()
        if outputs is None:  # it broke off, for a reason of its own
            return
        try:
            self._reached()
            self._depend(outputs)
        except BaseException:
            self.canary.drop()
            raise

    def _stop(self) -> None:
        self.inside = False
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if any(one is self.read for one in _READ):
            _READ[:] = [one for one in _READ if one is not self.read]
        if not _READ and _SHOWN:
            del NAMES["weight"]
            if (shown := _SHOWN.pop()) is not None:
                NAMES["weight"] = shown

    def _reached(self) -> None:
        """Stop where a layer was read by the module around it, and not called."""
        configs = self.canary.switch.configs
        names = tuple(n for n in self.names if n in configs and not configs[n].is_prompt_learning)
        silent = [path for path in self.unused() if id(self.hosts[path]) in self.read]
        silent = [path for path in silent if self.hosts[path].present(names)]
        if silent:
            self.complain(
                reads_by_itself(silent, type(inside(self.parents[silent[0]][0])).__name__)
            )

    def unused(self) -> list[str]:
        """Places whose layers did not run, and whose tensors got no gradient in another way, as
        prompts do; of those that can be seen.
        """
        idle = [path for path in self.parents if id(self.hosts[path]) not in self.ran]
        return [path for path in idle if all(place != path for place, _ in self.arrived)]

    def _depend(self, outputs: Any) -> None:
        floats = [t for t in tensors_in(outputs) if t.is_floating_point()]
        if floats and not any(t.requires_grad for t in floats):
            if not any(map(self._left_out, self.hosts)):
                self.complain(NOTHING)
            return
        found = _leaves([t.grad_fn for t in floats if t.grad_fn is not None])
        whole = found is not None and self.depends is not None and not _sharded(self.model)
        self.depends = self.depends | found if whole else None  # type: ignore[operator]

    # -- the backward

    def _arrive(self, named: Named, gradient: Tensor) -> None:
        self.arrived.add(named)
        local = getattr(gradient, "_local_tensor", gradient)
        if not self.scaled and type(local) in PLAIN and not local.is_meta:
            self.finite[named] = torch.isfinite(local).all()
        if not self.called:
            self.called = True
            torch.autograd.Variable._execution_engine.queue_callback(self._ended_backward)

    def _ended_backward(self) -> None:
        self.called = False
        self.judge()

    def living(self) -> list[Named]:
        """What trains at layers that ran, and was not dropped as a whole (module_dropout)."""
        idle = {*self.unused(), *filter(self._left_out, self.hosts)}
        return [named for named in self.trained if named[0] not in idle]

    def _left_out(self, path: str) -> bool:
        return any(part.absent for part in self.hosts[path].parts(self.names))

    def judge(self) -> None:
        """Stop where a gradient is not finite, or has no way to its tensor."""
        finite, self.finite = self.finite, {}
        bad = [] if _all(finite.values()) else [n for n, fine in finite.items() if not fine]
        if bad:
            self._give_up(
                without_gradient("what trains here gets a gradient that is not finite", bad)
            )
        living = self.living()
        if self.depends is None or not any(id(self.trained[n]) in self.depends for n in living):
            return
        cut = [n for n in living if id(self.trained[n]) not in self.depends]
        cut = [n for n in cut if not self._has(n)]
        if cut:
            self._give_up(without_gradient("what trains here gets no gradient", cut))

    def _has(self, named: Named) -> bool:
        return named in self.arrived or self.trained[named].grad is not None

    def _give_up(self, text: str) -> None:
        if POLICY.raises():
            self.canary.drop()
        self.complain(text)

    def complain(self, text: str) -> None:
        """An error; a warning, once, where PEFT's programs have to run as they did."""
        if POLICY.raises():
            raise TrainingError(text)
        self.tell(text)

    def tell(self, text: str) -> None:
        """A warning, once."""
        if text not in self.said:
            self.said.add(text)
            warn(text)

    def over(self) -> bool:
        """Whether the backward has been, or does not come."""
        return not self.settled and bool(self.arrived or self.forwards >= PATIENCE)

    def settle(self) -> None:
        """Judge the step, and watch no more; the optimizer may still show something."""
        self.judge()
        self.settled = True
        self.close()
        self.canary.prove(self.names)
        for path in self.unused():  # marked until it runs
            host = self.hosts[path]
            if not any(isinstance(h, Unused) for h in host._forward_pre_hooks.values()):
                host.register_forward_pre_hook(Unused())

    # -- the optimizer's step

    def stepping(self, held: set[int]) -> None:
        """An optimizer is about to use the gradients."""
        mine = [named for named in self.living() if id(self.trained[named]) in held]
        if not any(self._has(named) for named in mine):
            return
        self.steps += 1
        zero, before = self._zero(mine), self.zero
        self.zero = zero
        if self.steps == 1:
            if not self.settled:
                self.settle()
            if dead := [named for named in mine if not self._has(named)]:
                self.tell(without_gradient(UNSEEN, dead))
            self._tell_of_unused()
        elif both := sorted(before & zero):
            self.tell(without_gradient(ZERO, [(path, "") for path in both]))
        if self.steps > 1 or not zero:
            self.canary.drop()
            self.canary.retire(self.model)

    def _tell_of_unused(self) -> None:
        """Tell of layers that the module around them did not need, which may be no mistake."""
        idle = [p for p in self.unused() if id(self.parents[p][0]) in self.ran]
        idle = [p for p in idle if self.parents[p][1] and id(self.hosts[p]) not in self.read]
        if idle:
            self.tell(
                f"the adapter at {listed(idle)} did nothing in the first training step: the "
                "module around it ran and did not call that layer. model.unused_sites() tells "
                "which never run; leave them out with exclude_modules"
            )

    def _zero(self, mine: list[Named]) -> set[str]:
        """Places whose gradients are all zero, while others have some."""
        places: dict[str, bool] = {}
        for named in mine:
            grad = self.trained[named].grad
            if grad is None or type(grad) not in PLAIN or grad.is_meta:
                continue
            places[named[0]] = places.get(named[0], False) or bool(grad.any())
        return {p for p, some in places.items() if not some} if any(places.values()) else set()

    def close(self) -> None:
        """Take all hooks away."""
        self._stop()
        for handle in self.listening:
            handle.remove()
        self.listening.clear()


class Unused:
    """A hook on a layer that has not run in training; it goes when the layer runs."""

    def __call__(self, module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            remove(module, self)


def remove(module: nn.Module, hook: Any) -> None:
    """Take a hook away from in front of a module's forward."""
    for key in [k for k, h in module._forward_pre_hooks.items() if h is hook]:
        del module._forward_pre_hooks[key]


NOTHING = (
    "no gradient reaches the adapters: the outputs do not depend on any trainable tensor; look for "
    "torch.no_grad() or detach() in the model, or for gradient checkpointing of the model's own"
)
UNSEEN = "what trains here gets no gradient from this loss, which does not depend on it"
ZERO = "what trains here got a gradient of zeros alone in two steps"


def _reading(host: Host) -> Any:
    weight = host.base_layer.weight if _SHOWN[0] is None else _SHOWN[0](host)
    if weight is host.base_layer.weight:  # else what an adapter trains in its place has been read
        for read in _READ:
            read.add(id(host))
    return weight


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if OPEN:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for step in list(OPEN):
            step.stepping(held)


def _parents(model: nn.Module, places: Mapping[str, Host]) -> dict[str, tuple[nn.Module, bool]]:
    """The module around each layer, and whether it is that alone which calls the layer.

    Left out are layers that may be used without being called, and those in compiled modules.
    """
    modules, found = dict(walk(model)), {}
    compiled = [path for path, module in modules.items() if _compiled(module)]
    for path, host in places.items():
        above, alone = path, True
        if any(c in ("", path) or path.startswith(f"{c}.") for c in compiled):
            continue
        if isinstance(host.base_layer, (nn.ParameterList, nn.ParameterDict)):
            continue
        while above and isinstance(inside(modules[above := above.rpartition(".")[0]]), CONTAINERS):
            alone = False  # which of them runs is chosen
        embeds = isinstance(getattr(host, "site", None), Embedding)  # not with inputs_embeds
        found[path] = modules[above], alone and not embeds
    return found


def _compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _all(flags: Iterable[Tensor]) -> bool:
    """Whether all of these are true, asked once of each device."""
    places: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        places.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(own).all()) for own in places.values())


def _sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are others while it runs."""
    return any(type(m).__name__.startswith(("FSDP", "FullyShard")) for m in model.modules())


def _half(model: nn.Module) -> bool:
    """Whether losses may be scaled, so that gradients overflow on purpose."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) is torch.float16
    return any(p.dtype is torch.float16 for p in model.parameters())


def _leaves(roots: list[Any]) -> set[int] | None:
    """The leaf tensors that a graph ends at; None where a part of it cannot be seen."""
    seen, found, waiting = set(roots), set(), list(roots)
    while waiting:
        node = waiting.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        if any(hidden in node.name() for hidden in ("CheckpointFunction", "Compiled")):
            return None
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return found
