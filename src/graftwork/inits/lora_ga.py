"""LoRA-GA (arXiv 2407.05000): the gradient of W is U S V'; A = V'[:r], B = g (U S)[:, r:2r], so
that the first step of B A is the best one of its rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.layers import layers_of
from ..calibrate.run import gradients
from ..engine.site import Site
from ..errors import StateError
from ..files.tensors import cached
from .drawn import seeded
from .noted import asked, note
from .options import LoraGAConfig

KEY = "_peft_loraga_grad"  # behind a layer's path in PEFT's cache


def preprocess_loraga(
    model: nn.Module,
    lora_config: Any,
    train_step: Callable[[], Any],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Compute from gradients how adapters with ``init_lora_weights="lora_ga"`` will begin.

    Args:
        model: the model, to which ``get_peft_model`` comes afterwards; it is not changed.
        lora_config: the config that the adapter will have, with its ``lora_ga_config``.
        train_step: runs forward and backward passes, and no optimizer.
        cache_file: where the gradients are kept, or found again.

    Raises:
        ValueError: the config has another start, or a weight has no gradient.
    """
    asked("lora_ga", lora_config)
    wishes = LoraGAConfig.of(lora_config.lora_ga_config)
    found = layers_of(model, lora_config)
    for site in found.values():
        if not site.raw.is_floating_point():
            raise ValueError(
                f"{site.path} is quantised, so its weight has no gradient; call preprocess_loraga "
                "on the model before it is quantised"
            )

    def computed() -> dict[str, Tensor]:
        return {f"{p}.{KEY}": g for p, g in gradients(model, found, train_step).items()}

    cache = cached(cache_file, next(model.parameters()).device, computed)
    with torch.no_grad():
        for path, site in found.items():
            if f"{path}.{KEY}" not in cache:
                raise StateError(
                    f"no gradient reached the weight of {path} while train_step ran, or the cache "
                    "is another config's; call loss.backward() in train_step, and leave layers "
                    "that the loss does not depend on out of target_modules"
                )
            g = site.to_matrix(cache[f"{path}.{KEY}"].float())
            a, b = factors(site, g, lora_config.at(path).r, wishes)
            note(site.layer, "lora_ga", a, b, power=float(wishes.scale == "gd_scale"))


def factors(site: Site, g: Tensor, r: int, wishes: LoraGAConfig) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) from the gradient g (out, in)."""
    small = min(site.shape)
    if 2 * r > small:
        raise ValueError(
            f"LoRA-GA takes 2 r = {2 * r} directions, and {site.path} {site.describe()} has "
            f"{small}; use r<={small // 2} there (rank_pattern)"
        )
    with seeded(0, g.device):  # the same choice each time
        u, s, v = torch.svd_lowrank(g, q=min(4 * r, small), niter=4)
        of_a, of_b = {
            "ArB2r": lambda: (torch.arange(r), torch.arange(r, 2 * r)),
            "A2rBr": lambda: (torch.arange(r, 2 * r), torch.arange(r)),
            "ArBr": lambda: (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
            "random": lambda: (torch.randperm(2 * r)[:r],) * 2,
        }[wishes.direction]()
        a, b = v.mT[of_a], u[:, of_b] * s[of_b]
        if wishes.scale == "stable":
            b = b * site.shape[0] ** 0.25 / wishes.stable_gamma**0.5
        elif wishes.scale == "weight_svd":
            top = torch.svd_lowrank(site.weight.float(), q=r, niter=4)[1][0]
            b = b * (top / s[of_b[0]] if s[of_b[0]] > 0 else 1)
    return a.contiguous(), b.contiguous()
