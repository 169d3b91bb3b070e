"""The LoRAs of a model that train, and their gradients on the way to the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..calibrate.layers import loras
from ..engine.site import Embedding, as_factors
from ..methods.lora import LoRA


def pairs(model: nn.Module) -> list[LoRA]:
    """The LoRAs of a model's adapters that train."""
    return [part for part in loras(model) if part.A.requires_grad or part.B.requires_grad]


def roles(part: LoRA) -> tuple[nn.Parameter, nn.Parameter]:
    """The factor that is random at the start, and the one that is zero: A and B; at an embedding B
    and A.
    """
    return (part.B, part.A) if isinstance(part.site, Embedding) else (part.A, part.B)


def preconditioned(part: LoRA, p: nn.Parameter, damping: float) -> Tensor:
    """(B'B + damping)^-1 g_A where p is A, g_B (A A' + damping)^-1 where it is B."""
    assert p.grad is not None
    wide = torch.promote_types(p.grad.dtype, torch.float32)
    a, b, g = part.A.to(wide), part.B.to(wide), p.grad.to(wide)
    if p is part.A:
        g, b = as_factors(g, b, part.lead)
        return part.site.from_factors(_inverse(b.mT @ b, damping) @ g, b)[0]
    a, g = as_factors(a, g, part.lead)
    return part.site.from_factors(a, g @ _inverse(a @ a.mT, damping))[1]


def _inverse(square: Tensor, damping: float) -> Tensor:
    eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    inverse: Tensor = torch.linalg.pinv(square + damping * eye)
    return inverse
