"""CorDA (arXiv 2406.05223): W C = U S V', C = E[x x']; A = sqrt(S_r / s) V_r' C^-1, B = U_r
sqrt(S_r / s), from the strongest directions (ipm) or the weakest (kpm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.layers import layers_of
from ..calibrate.run import covariances
from ..engine.site import Site
from ..errors import StateError
from ..files.tensors import cached
from .noted import asked, note
from .options import CordaConfig
from .svd import fits

PARTS = ("S_WC", "U_WC", "V_WC")  # PEFT's names in a cache: (r,), (out, r), (in, r)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Compute from data how adapters with ``init_lora_weights="corda"`` will begin in this model.

    Args:
        model: the model, to which ``get_peft_model`` comes afterwards; it is not changed.
        lora_config: the config that the adapter will have, with its ``corda_config``.
        run_model: runs the model over samples; not needed where a cache has been written before.
        hooked_model: the model that ``run_model`` runs, where it is another one.

    Raises:
        ValueError: the config has another start, or there are no data.
    """
    asked("corda", lora_config)
    wishes = CordaConfig.of(lora_config.corda_config)
    found = layers_of(model, lora_config)
    device = next(model.parameters()).device

    def measured() -> dict[str, Tensor]:
        if run_model is None:
            raise ValueError(
                "CorDA needs data: give run_model, a function that runs the model over samples, or "
                "a corda_config whose cache_file or covariance_file has been written before"
            )
        watched, half = hooked_model or model, wishes.use_float16_for_covariance
        return covariances(watched, layers_of(watched, lora_config), run_model, half)

    def starts() -> dict[str, Tensor]:
        of = cached(wishes.covariance_file, device, measured)
        new: dict[str, Tensor] = {}
        for path, site in found.items():
            r, c = lora_config.at(path).r, _of(of, path, path)
            eigens = directions(site, c, r, wishes.corda_method)
            new |= {f"{path}.eigens.{k}": t for k, t in zip(PARTS, eigens, strict=True)}
        return new

    cache = cached(wishes.cache_file, device, starts)
    for path, site in found.items():
        s, u, v = (_of(cache, f"{path}.eigens.{key}", path) for key in PARTS)
        note(site.layer, "corda", s.sqrt()[:, None] * v.mT, u * s.sqrt(), power=0.5)


def directions(site: Site, c: Tensor, r: int, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """S (r,), U (out, r) and C^-1 V (in, r) of W C."""
    fits(r, site)
    c, damp = c.float(), 0.01
    eye, mean = torch.eye(len(c), device=c.device), c.diagonal().mean()
    while True:  # until the inverse is one
        damped = c + damp * mean * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(site.weight.float() @ damped, full_matrices=False)
    at = slice(0, r) if which == "ipm" else slice(len(s) - r, len(s))
    return s[at].clone(), u[:, at].clone(), (vh @ inverse).mT[:, at].clone()


def _of(tensors: Mapping[str, Tensor], key: str, path: str) -> Tensor:
    if key not in tensors:
        raise StateError(
            f"no input reached {path} while run_model ran, or the cache is another config's; run "
            "the model itself in run_model, and leave layers that it does not call out of "
            "target_modules"
        )
    return tensors[key]
