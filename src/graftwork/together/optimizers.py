"""The optimizers of runs: AdamW for all of them in few calls, or one of a run's own.

``torch.optim.AdamW`` spends more time on going through its tensors one by one in Python than on the
tensors of an adapter; here each run is one call of torch's fused kernel with lists that are made
once. Methods that follow the optimizer get a ``torch.optim.Optimizer``, whose hooks call them.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self.turned = [False] * len(parameters)  # those that lie transposed
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        self.device = self.parameters[0].device
        # one count for all, until one of them has no gradient and its moments stay behind
        self.steps = [torch.zeros((), dtype=torch.float32, device=self.device)] * len(parameters)

    @torch.no_grad()
    def lie(self) -> None:
        """Lay the moments out as the tensors lie now, of which some may be transposed."""
        for i, p in enumerate(self.parameters):
            turned = not p.is_contiguous() and p.mT.is_contiguous()
            if turned != self.turned[i]:
                self.turned[i] = turned
                for every in (self.mean, self.square):
                    every[i] = every[i].mT.contiguous()

    @torch.no_grad()
    def step(self, factor: float, shrink: float) -> None:
        """One step at this share of the rate, with the gradients divided by ``shrink``."""
        every = [p.grad for p in self.parameters]
        lists: list[list[Any]] = [self.parameters, every, self.mean, self.square, self.steps]
        if any(self.turned):  # the kernel is slow with tensors that are not contiguous
            lists[:2] = [
                [t.mT if turned and t is not None else t
                 for t, turned in zip(one, self.turned, strict=True)]
                for one in lists[:2]
            ]  # fmt: skip
        if any(g is None for g in lists[1]):
            lists[-1] = self.steps = [n.clone() for n in self.steps]
            have = [i for i, g in enumerate(lists[1]) if g is not None]
            lists = [[one[i] for i in have] for one in lists]
        tensors, grads, mean, square, steps = lists
        for count in {id(n): n for n in steps}.values():
            count += 1
        torch._fused_adamw_(
            tensors, grads, mean, square, [], steps, lr=self.rate * factor,
            beta1=BETAS[0], beta2=BETAS[1], weight_decay=self.decay, eps=EPS, amsgrad=False,
            maximize=False,
            grad_scale=None if shrink == 1 else torch.tensor(shrink, device=self.device),
        )  # fmt: skip
        torch.autograd.graph.increment_version(tensors)  # which the fused kernel leaves


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

    def step(self, factor: float, norm: float) -> None:
        """One step at this share of the peak rates; the gradients are gone afterwards.

        Args:
            factor: the share.
            norm: of the gradients, which are scaled down to the run's largest.
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
            moments.step(factor, shrink)
        self.forget()

    def lie(self) -> None:
        """Follow the tensors, which lie otherwise than before."""
        for moments in self.moments:
            moments.lie()

    def forget(self) -> None:
        """Drop the gradients."""
        for p in self.parameters:
            p.grad = None


@torch.no_grad()
def norms(steppers: Sequence[Stepper], stacks: Sequence[Stack] = ()) -> Tensor:
    """The norm of each run's gradients, (runs,), as ``clip_grad_norm_`` computes it.

    Args:
        steppers: the runs'.
        stacks: those that have shared their gradients.
    """
    run_of = {id(p): i for i, one in enumerate(steppers) for p in one.parameters}
    wholes: dict[tuple[int, ...], list[Tensor]] = {}  # gradients in stacks, by the runs of rows
    for stack in stacks:
        for side, whole in ((stack.a, stack.down.grad), (stack.b, stack.up.grad)):
            if whole is not None:
                wholes.setdefault(tuple(run_of.pop(id(p)) for p in side), []).append(whole)
    grads = [[p.grad for p in one.parameters if p.grad is not None and id(p) in run_of]
             for one in steppers]  # fmt: skip
    every: Any = torch._foreach_norm([g for own in grads for g in own]) if any(grads) else []
    first = next((own[0] for own in (*wholes.values(), every) if own), torch.zeros(0))
    parts = torch.stack([n.float().to(first.device) for n in every]) if every else torch.zeros(0)
    pieces = torch.split(parts, [len(own) for own in grads])
    terms = [torch.stack([torch.linalg.vector_norm(piece) for piece in pieces]).to(first.device)]
    for runs, own in wholes.items():
        each = [torch.linalg.vector_norm(g, dim=(1, 2)).float().to(first.device) for g in own]
        found = torch.linalg.vector_norm(torch.stack(each), dim=0)
        terms.append(torch.zeros_like(terms[0]).index_copy_(0, _index(runs, found), found))
    return terms[0] if len(terms) == 1 else torch.linalg.vector_norm(torch.stack(terms), dim=0)


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)
