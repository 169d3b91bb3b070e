"""The optimizers of runs: AdamW for all of them in few calls, or one of a run's own.

``torch.optim.AdamW`` spends more time on going through its tensors one by one in Python than on the
tensors of an adapter; here each run is one call of torch's fused kernel with lists that are made
once. Methods that follow the optimizer get a ``torch.optim.Optimizer``, whose hooks call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..fast.stack import Stack
from .runs import Run
from .state import Held

BETAS, EPS = (0.9, 0.999), 1e-8  # those of torch.optim.AdamW


class Moments:
    """AdamW over the tensors of one group: the same numbers as ``torch.optim.AdamW``.

    Args:
        parameters: the tensors, all on one device.
        rate: peak learning rate.
        decay: weight decay.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float, decay: float) -> None:
        self.parameters, self.rate, self.decay = list(parameters), rate, decay
        self.ids = list(map(id, parameters))
        self.tensors = self.parameters  # as they lie: a row of a stack in place of its factor
        self.turned = [False] * len(parameters)  # rows that are the factor transposed
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        self.device = self.parameters[0].device
        # one count for all, until one of them has no gradient and its moments stay behind
        self.steps = [torch.zeros((), dtype=torch.float32, device=self.device)] * len(parameters)

    @torch.no_grad()
    def lie(self, rows: Mapping[int, tuple[Tensor, bool]]) -> None:
        """Work on rows of stacks where parameters are in them; see ``Stacks.rows``."""
        found = [
            rows.get(key, (p, False)) for key, p in zip(self.ids, self.parameters, strict=True)
        ]
        self.tensors = [tensor for tensor, _ in found]
        for i, (_, turned) in enumerate(found):
            if turned != self.turned[i]:
                self.turned[i] = turned
                for every in (self.mean, self.square):
                    every[i] = every[i].mT.contiguous()

    def _gradients(self, given: Mapping[int, Tensor]) -> list[Tensor | None]:
        """Those of ``tensors``."""
        grads = list(map(given.get, self.ids))
        for i, grad in enumerate(grads):
            if grad is None and (own := self.parameters[i].grad) is not None:
                grads[i] = own.mT.contiguous() if self.turned[i] else own
        return grads

    @torch.no_grad()
    def step(self, factor: float, shrink: float, given: Mapping[int, Tensor] | None = None) -> None:
        """One step at this share of the rate, with the gradients divided by ``shrink``; ``given``
        as in ``Stacks.share``.
        """
        every = self._gradients(given or {})
        lists: list[list[Any]] = [
            self.tensors, every, self.mean, self.square, self.steps, self.parameters
        ]  # fmt: skip
        if any(g is None for g in every):
            lists[4] = self.steps = [n.clone() for n in self.steps]
            have = [i for i, g in enumerate(every) if g is not None]
            lists = [[one[i] for i in have] for one in lists]
        tensors, grads, mean, square, steps, parameters = lists
        for count in {id(n): n for n in steps}.values():
            count += 1
        torch._fused_adamw_(
            tensors, grads, mean, square, [], steps, lr=self.rate * factor,
            beta1=BETAS[0], beta2=BETAS[1], weight_decay=self.decay, eps=EPS, amsgrad=False,
            maximize=False,
            grad_scale=None if shrink == 1 else torch.tensor(shrink, device=self.device),
        )  # fmt: skip
        torch.autograd.graph.increment_version(parameters)  # which the fused kernel leaves


def fits(parameters: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernel takes these tensors."""
    kinds = {(p.device, p.dtype) for p in parameters}
    return len(kinds) == 1 and next(iter(kinds))[0].type in ("cpu", "cuda")


class Stepper:
    """The optimizer of one run.

    Args:
        run: how it learns.
        held: its adapter.
        follows: whether its method follows the steps of a torch optimizer.
    """

    def __init__(self, run: Run, held: Held, follows: bool) -> None:
        self.run, self.parameters = run, held.parameters
        self.apart = self.parameters  # those that are in no stack
        groups: list[dict[str, Any]] = [
            {"params": tensors, "lr": rate, "weight_decay": run.weight_decay}
            for tensors, rate in (
                (held.own, run.learning_rate),
                (held.heads, run.head_learning_rate or run.learning_rate),
            )
            if tensors
        ]
        self.moments: list[Moments] = []
        self.own: Any = None
        if run.optimizer is not None:
            self.own = run.optimizer(groups)
        elif follows or not all(fits(group["params"]) for group in groups):
            self.own = torch.optim.AdamW(groups)
        else:
            self.moments = [Moments(g["params"], g["lr"], g["weight_decay"]) for g in groups]
        if self.own is not None:
            self.peaks = [group["lr"] for group in self.own.param_groups]

    def step(self, factor: float, norm: float, given: Mapping[int, Tensor]) -> None:
        """One step at this share of the peak rates; the gradients are gone afterwards.

        Args:
            factor: the share.
            norm: of the gradients, which are scaled down to the run's largest.
            given: those of rows of stacks, by the id of the parameter.
        """
        most = self.run.max_grad_norm
        shrink = 1.0 if most is None else max(1.0, (norm + 1e-6) / most)
        if self.own is not None:
            if shrink > 1:
                torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], shrink)
            for group, peak in zip(self.own.param_groups, self.peaks, strict=True):
                group["lr"] = peak * factor
            self.own.step()
        for moments in self.moments:
            moments.step(factor, shrink, given)
        self.forget()

    def lie(self, rows: Mapping[int, tuple[Tensor, bool]]) -> None:
        """Work on rows of stacks where parameters are in them; see ``Stacks.rows``."""
        self.apart = [p for p in self.parameters if id(p) not in rows]
        for moments in self.moments:
            moments.lie(rows)

    def forget(self) -> None:
        """Drop the gradients, except those of stacks."""
        for p in self.apart:
            p.grad = None


@torch.no_grad()
def norms(steppers: Sequence[Stepper], stacks: Iterable[Stack] = ()) -> Tensor:
    """The norm of each run's gradients, (runs,), as ``clip_grad_norm_`` computes it.

    Args:
        steppers: the runs'.
        stacks: what some of their parameters are in.
    """
    run_of = {id(p): i for i, one in enumerate(steppers) for p in one.parameters}
    wholes: dict[tuple[int, ...], list[Tensor]] = {}  # gradients in stacks, by the runs of rows
    apart = [list(one.apart) for one in steppers]
    for stack in stacks:
        if stack.down.grad is not None and stack.up.grad is not None:
            runs = tuple(run_of[id(p)] for p in stack.a)
            wholes.setdefault(runs, []).extend((stack.down.grad, stack.up.grad))
        else:
            for p in stack.factors:
                apart[run_of[id(p)]].append(p)
    terms = [_norms([[p.grad for p in own if p.grad is not None] for own in apart])]
    for runs, own in wholes.items():
        device = own[0].device
        each = [torch.linalg.vector_norm(g, dim=(1, 2)).float().to(device) for g in own]
        found = torch.linalg.vector_norm(torch.stack(each), dim=0)
        places = torch.tensor(runs, device=device)
        terms.append(found.new_zeros(len(steppers)).index_copy_(0, places, found))
    device = terms[-1].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([t.to(device) for t in terms]), dim=0)
    return total


def _norms(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """The norm of all tensors in each of the sequences."""
    every: Any = torch._foreach_norm([g for own in grads for g in own]) if any(grads) else []
    device = every[0].device if every else torch.device("cpu")
    parts = torch.stack([n.float().to(device) for n in every]) if every else torch.zeros(0)
    pieces = torch.split(parts, [len(own) for own in grads])
    return torch.stack([torch.linalg.vector_norm(piece) for piece in pieces])
