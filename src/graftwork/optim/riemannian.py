"""Riemannian preconditioning (arXiv 2402.02347): g_A <- (B'B + reg)^-1 g_A, g_B <- g_B (AA' +
reg)^-1, then any optimizer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .pairs import pairs, preconditioned


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-2,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer before whose steps the gradients of LoRAs are preconditioned.

    Args:
        model: a model with LoRAs.
        optimizer_cls: any class of optimizers whose step needs no closure.
        lr: its rate.
        reg: what is added to the diagonals.
        **kwargs: the class's own options.

    Raises:
        TypeError: ``optimizer_cls`` is no class of optimizers.
        ValueError: no LoRA trains, or the class needs a closure.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls={optimizer_cls!r}; give one such as torch.optim.AdamW")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} computes the loss several times a step, each time with "
            "other gradients; use one whose step needs no closure, such as torch.optim.AdamW"
        )
    found = pairs(model)
    if not found:
        raise ValueError("no LoRA of this model trains, so there is nothing to precondition")
    options: dict[str, Any] = {"lr": lr, **kwargs}
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **options)

    @torch.no_grad()
    def before(_: Optimizer, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], given.get("closure"))):
            raise ValueError(
                "a closure computes new gradients inside the step, after they were "
                "preconditioned; compute them before, and call step() without it"
            )
        for part in found:
            for p in (part.A, part.B):
                if p.grad is not None:
                    p.grad.copy_(preconditioned(part, p, reg))

    optimizer.register_step_pre_hook(before)
    return optimizer
