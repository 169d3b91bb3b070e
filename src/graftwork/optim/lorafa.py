"""LoRA-FA (arXiv 2308.03303): A stays as it was drawn; g_B <- g_B (A A' + 1e-8)^-1 / s^2, then
AdamW: the step of B A that is closest to the step of full training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import warn
from ..methods.lora import LoRA
from .pairs import pairs, preconditioned, roles

DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, which projects the gradients of LoRAs (``lora_pairs``) whose other factor is frozen.

    ``correct_bias``: whether the running means are corrected for their start at zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        lora_pairs: Iterable[LoRA] = (),
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be below 1, and not negative")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "correct_bias": correct_bias})
        self.part_of = {id(roles(part)[1]): part for part in lora_pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    part = self.part_of.get(id(p))
                    self._update(p, p.grad if part is None else projected(part), group)
        return loss

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        state["step"] += 1
        state["m"].lerp_(g, 1 - beta1)
        state["v"].lerp_(g.square(), 1 - beta2)
        rate = group["lr"]
        if group["correct_bias"]:
            rate *= (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        p.addcdiv_(state["m"], state["v"].sqrt() + group["eps"], value=-rate)
        p.mul_(1 - group["lr"] * group["weight_decay"])


def projected(part: LoRA) -> Tensor:
    """The gradient of B for the step of B A that is nearest to W's own; of A at an embedding."""
    _, learned = roles(part)
    return (preconditioned(part, learned, DAMPING) / part.scale**2).to(learned.dtype)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze the random factor of every LoRA that trains, and make its optimizer.

    ``r``, ``lora_alpha`` and ``use_rslora`` are PEFT's arguments; each layer's own scale counts.

    Raises:
        ValueError: no LoRA trains.
    """
    found = pairs(model)
    if not found:
        raise ValueError("no LoRA of this model trains; LoRA-FA is for models with a LoraConfig")
    scales = {float(part.scale) for part in found}
    roots = (False, True) if use_rslora is None else (use_rslora,)
    meant = [lora_alpha / (math.sqrt(r) if root else r) for root in roots]
    if not any(math.isclose(s, m) for s in scales for m in meant):
        warn(
            f"r={r} and lora_alpha={lora_alpha} fit no LoRA of this model, whose scales are "
            f"{sorted(scales)}; those of the layers are used"
        )
    for part in found:
        roles(part)[0].requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    return LoraFAOptimizer(params, lr, weight_decay=weight_decay, lora_pairs=found)
