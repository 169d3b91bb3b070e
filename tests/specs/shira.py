"""SHiRA."""

from typing import Any

import torch
from torch import Tensor, nn

from graftwork import ShiraConfig
from specs import Case, Parity


def first(layer: nn.Module, r: int, **options: Any) -> Tensor:
    """A mask of the first entries of a weight."""
    w = layer.weight
    mask = torch.arange(w.numel()) < r * (len(w) + w[0].numel())
    return mask.to(w).reshape(w.shape)


def chosen() -> ShiraConfig:
    config = ShiraConfig(r=1, mask_type="first")
    config.mask_fn = first
    return config


CASES = {
    "shira": Case(lambda: ShiraConfig(r=1), main=True),
    "shira_random": Case(
        lambda: ShiraConfig(r=1, random_seed=3, init_weights=False), identity=False
    ),
    "shira_mask": Case(chosen, lacks="fold"),  # a mask is of the shape of a layer's weight
}
PLAIN = {"r": 2, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "ShiraConfig", PLAIN),
    Parity("plain", "ShiraConfig", {**PLAIN, "random_seed": 3, "init_weights": False}, "seed"),
    Parity("llama", "ShiraConfig", LLAMA, train=True),
]
