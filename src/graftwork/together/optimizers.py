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
from torch.optim.adamw import adamw

from .runs import Run
from .state import Held

BETAS, EPS = (0.9, 0.999), 1e-8  # those of torch.optim.AdamW


class Moments:
    """AdamW over the tensors of one group: the same numbers as ``torch.optim.AdamW``.

    Args:
        parameters: the tensors.
        rate: peak learning rate.
        decay: weight decay.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float, decay: float) -> None:
        self.parameters, self.rate, self.decay = list(parameters), rate, decay
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        device = self.parameters[0].device
        self.fused = device.type in ("cpu", "cuda") and all(
            p.is_floating_point() for p in parameters
        )
        on = device if device.type == "cuda" else torch.device("cpu")
        self.steps = [torch.zeros((), dtype=torch.float32, device=on) for _ in parameters]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step with the gradients that are there."""
        rows = [
            (p, p.grad, m, s, n)
            for p, m, s, n in zip(self.parameters, self.mean, self.square, self.steps, strict=True)
            if p.grad is not None
        ]
        if rows:
            parameters, grads, means, squares, steps = map(list, zip(*rows, strict=True))
            adamw(
                parameters, grads, means, squares, [], steps,
                fused=self.fused, foreach=False if not self.fused else None, amsgrad=False,
                beta1=BETAS[0], beta2=BETAS[1], lr=self.rate * factor,
                weight_decay=self.decay, eps=EPS, maximize=False,
            )  # fmt: skip


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
        elif follows:
            self.own = torch.optim.AdamW(groups)
        else:
            self.moments = [Moments(g["params"], g["lr"], g["weight_decay"]) for g in groups]
        if self.own is not None:
            self.peaks = [group["lr"] for group in self.own.param_groups]

    def step(self, factor: float) -> None:
        """One step at this share of the peak rates; the gradients are gone afterwards."""
        if self.own is not None:
            for group, peak in zip(self.own.param_groups, self.peaks, strict=True):
                group["lr"] = peak * factor
            self.own.step()
        for moments in self.moments:
            moments.step(factor)
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        for p in self.parameters:
            p.grad = None


@torch.no_grad()
def norms(steppers: Sequence[Stepper]) -> Tensor:
    """The norm of each run's gradients, (runs,), as ``clip_grad_norm_`` computes it."""
    grads = [[p.grad for p in one.parameters if p.grad is not None] for one in steppers]
    every: Any = torch._foreach_norm([g for own in grads for g in own]) if any(grads) else []
    device = every[0].device if every else torch.device("cpu")
    parts = torch.stack([n.float().to(device) for n in every]) if every else torch.zeros(0)
    pieces = torch.split(parts, [len(own) for own in grads])
    return torch.stack([torch.linalg.vector_norm(piece) for piece in pieces])


@torch.no_grad()
def clip(stepper: Stepper, norm: float) -> None:
    """Scale a run's gradients down to its largest norm."""
    most = stepper.run.max_grad_norm
    if most is not None and (scale := most / (norm + 1e-6)) < 1:
        torch._foreach_mul_([p.grad for p in stepper.parameters if p.grad is not None], scale)
