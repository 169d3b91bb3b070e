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
from .pairs import Pair, pairs

DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, which projects the gradients of LoRAs whose other factor is frozen.

    Args:
        params: parameters, or groups of them.
        lr: the rate.
        betas: of the running means of the gradient and its square.
        eps: added to the root of the latter.
        weight_decay: a share of the rate.
        correct_bias: whether the means are corrected for their start at zero.
        lora_pairs: the LoRAs; ``create_lorafa_optimizer`` finds them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        lora_pairs: Iterable[Pair] = (),
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be below 1, and not negative")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "correct_bias": correct_bias})
        self.pair_of = {id(pair.learned): pair for pair in lora_pairs}

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
                    pair = self.pair_of.get(id(p))
                    self._update(p, p.grad if pair is None else projected(pair), group)
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


def projected(pair: Pair) -> Tensor:
    """The gradient of B for the step of B A that is nearest to W's own; of A at an embedding."""
    g, s = pair.learned.grad, pair.part.scale
    assert g is not None
    wide = torch.promote_types(g.dtype, torch.float32)
    if pair.embedding:
        g_a, b = pair.matrices(g.to(wide), pair.part.B.to(wide))
        new = pair.stored(_inverse(b.mT @ b) @ g_a / s**2, b)[0]
    else:
        a, g_b = pair.matrices(pair.part.A.to(wide), g.to(wide))
        new = pair.stored(a, g_b @ _inverse(a @ a.mT) / s**2)[1]
    return new.to(g.dtype)


def _inverse(square: Tensor) -> Tensor:
    eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    inverse: Tensor = torch.linalg.pinv(square + DAMPING * eye)
    return inverse


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze the random factor of every LoRA that trains, and make its optimizer.

    Args:
        model: a model with LoRAs.
        r: PEFT's argument; each layer's own rank counts.
        lora_alpha: the same.
        lr: the rate.
        weight_decay: AdamW's.
        use_rslora: the same as ``r``.

    Raises:
        ValueError: no LoRA trains.
    """
    found = pairs(model)
    if not found:
        raise ValueError("no LoRA of this model trains; LoRA-FA is for models with a LoraConfig")
    scales = {float(pair.part.scale) for pair in found}
    roots = (False, True) if use_rslora is None else (use_rslora,)
    meant = [lora_alpha / (math.sqrt(r) if root else r) for root in roots]
    if not any(math.isclose(s, m) for s in scales for m in meant):
        warn(
            f"r={r} and lora_alpha={lora_alpha} fit no LoRA of this model, whose scales are "
            f"{sorted(scales)}; those of the layers are used"
        )
    for pair in found:
        pair.frozen.requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    return LoraFAOptimizer(params, lr, weight_decay=weight_decay, lora_pairs=found)
