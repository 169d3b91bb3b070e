"""The first training step with an adapter is watched, whoever's loop it is; after it, nothing is.

A hook in front of the user's model notes in its first forward with gradients which layers ran, and
what the outputs depend on; hooks on the tensors that train note their gradients. An error comes as
soon as it is certain: where a layer was read and not called, at the end of that forward; where a
tensor has no way to the outputs, or a gradient is no finite number, at the end of the backward.
What need not be wrong is a warning, or waits in ``unused_sites``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..engine import inject as injection
from ..engine.switch import BASE, Switch
from ..engine.tree import hosts
from ..errors import POLICY
from ..fast.plain import traced
from . import checkpoint
from .step import OPEN, PATIENCE, Step, Unused, remove


class Canary:
    """A hook in front of a model's forward, for as long as an adapter of it is unproven."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.step: Step | None = None
        self.paused = False

    def __getstate__(self) -> dict[str, Any]:
        return {"switch": self.switch, "step": None, "paused": False}

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not module.training:
            self.mixed()
            return
        if self.paused or POLICY.effect == "off" or getattr(module, "_is_replica", False):
            return
        step = self.step
        if traced(torch.empty(0)) or (step is not None and step.inside):
            return
        if step is not None and step.over():
            step.settle()
        names = self.unproven()
        if names and (step is None or step.names != names):
            self.drop()
            self.step = step = Step(self, module, names)
        if names and step is not None:
            step.watch()
        else:
            self.wait(module)

    def unproven(self) -> tuple[str, ...]:
        """The adapters of this call, where one of them was never seen to learn."""
        call = self.switch.current()
        names = tuple(dict.fromkeys(n for n in call.rows or call.active if n != BASE))
        return () if proven(self.switch, names) or self.switch.merged else names

    def wait(self, module: nn.Module) -> None:
        """A forward with nothing to see in it: for how long the optimizer's step is waited for."""
        if self.step is not None:
            self.step.waited += 1
            if self.step.waited > PATIENCE or not self.step.arrived:  # no backward: no training
                self.drop()
        self.retire(module)

    def prove(self, names: tuple[str, ...]) -> None:
        """These adapters are what they should be."""
        configs = self.switch.configs
        self.switch.proven |= {name: configs[name] for name in names if name in configs}

    def retire(self, module: nn.Module) -> None:
        """Go, where there is nothing left to watch."""
        if self.step is None:
            configs = self.switch.configs.items()
            if proven(self.switch, [n for n, config in configs if not config.inference_mode]):
                remove(module, self)

    def mixed(self) -> None:
        """A forward in eval() whose gradients would be taken for those of the one before."""
        if self.step is not None and not self.step.settled and not self.step.inside:
            self.drop()

    def drop(self) -> None:
        """Forget what was seen of a step."""
        if self.step is not None:
            self.step.close()
            OPEN.discard(self.step)
        self.step = None


def watch(model: nn.Module, switch: Switch, trains: bool) -> None:
    """Follow a change: with an adapter goes what was seen of it, with the last one the hooks."""
    if not switch.configs or injection.switch_of(model) is None:
        for module in model.modules():
            for hook in [h for h in module._forward_pre_hooks.values() if isinstance(h, MINE)]:
                if isinstance(hook, Canary):
                    hook.drop()
                remove(module, hook)
        return
    checkpoint.install()
    for hook in [h for h in model._forward_pre_hooks.values() if isinstance(h, Canary)]:
        if hook.step is not None and not switch.configs.keys() >= set(hook.step.names):
            hook.drop()  # it holds tensors of an adapter that is gone
    if trains:
        arm(model, switch)


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Within the block, forwards of a model are no training."""
    hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Canary)]
    for hook in hooks:
        hook.paused = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.paused = False


def arm(model: nn.Module, switch: Switch) -> None:
    """Watch the next training step of a model whose active adapters have to show what they do."""
    if POLICY.effect == "off" or proven(switch, switch.active):
        return
    here = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Canary)]
    for hook in here:
        if hook.step is not None and not hook.step.trained:
            hook.drop()  # something may train now
    if not here:
        model.register_forward_pre_hook(Canary(switch))


def proven(switch: Switch, names: Iterable[str]) -> bool:
    """Whether each of these adapters was seen to learn, or is none any more."""
    configs, seen = switch.configs, switch.proven
    return all(name not in configs or seen.get(name) is configs[name] for name in names)


MINE = (Canary, Unused)
injection.WATCHES.append(watch)


def unused_sites(model: nn.Module) -> list[str]:
    """Places of adapters that have been trained without their layers having run."""
    return [
        path
        for path, host in hosts(model).items()
        if any(isinstance(hook, Unused) for hook in host._forward_pre_hooks.values())
    ]
