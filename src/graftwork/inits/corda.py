"""CorDA (arXiv 2406.05223): W C = U S V', C = E[x x']; A = sqrt(S_r / s) V_r' C^-1, B = U_r
sqrt(S_r / s), from the strongest directions (ipm) or the weakest (kpm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.site import Site
from ..errors import StateError
from . import observe
from .noted import note
from .options import CordaConfig

PARTS = ("S_WC", "U_WC", "V_WC")  # PEFT's names in a cache: (r,), (out, r), (in, r)
Eigens = tuple[Tensor, Tensor, Tensor]


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
    wishes = CordaConfig.of(lora_config.corda_config)
    found = observe.sites(model, lora_config, "corda")
    device = next(model.parameters()).device
    cache = observe.recall(wishes.cache_file, device)
    if cache is None:
        covariances = observe.recall(wishes.covariance_file, device)
        if covariances is None:
            run, watched = _runner(run_model), hooked_model or model
            covariances = _covariances(watched, lora_config, run, wishes)
            observe.remember(wishes.covariance_file, covariances)
        cache = {}
        for path, site in found.items():
            c = _of(covariances, path, path)
            eigens = directions(site, c, lora_config.at(path).r, wishes.corda_method)
            cache |= {f"{path}.eigens.{k}": t for k, t in zip(PARTS, eigens, strict=True)}
        observe.remember(wishes.cache_file, cache)
    for path, site in found.items():
        s, u, v = (_of(cache, f"{path}.eigens.{key}", path) for key in PARTS)
        note(site.layer, "corda", s.sqrt()[:, None] * v.mT, u * s.sqrt(), power=0.5)


def directions(site: Site, c: Tensor, r: int, which: str) -> Eigens:
    """S (r,), U (out, r) and C^-1 V (in, r) of W C."""
    if r > min(site.shape):
        raise ValueError(
            f"r={r} is more than the {min(site.shape)} directions of {site.path} "
            f"{site.describe()}; use r<={min(site.shape)} there (rank_pattern)"
        )
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


def _covariances(
    model: nn.Module, config: Any, run: Callable[[], Any], wishes: CordaConfig
) -> dict[str, Tensor]:
    """E[x x'] (in, in) by path; each batch is divided by its largest entry, as in the paper's
    code.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(path: str, given: Any) -> None:
        x = given[0].detach().reshape(-1, given[0].shape[-1])  # (n, in)
        x = x if wishes.use_float16_for_covariance else x.float()
        x = x / x.max().abs()
        c = x.mT @ x
        if not torch.isfinite(c).all():
            raise ValueError(
                f"the inputs of {path} are not finite, or all zero; look at the data, or leave "
                "use_float16_for_covariance out"
            )
        sums[path] = sums[path] + c if path in sums else c
        counts[path] = counts.get(path, 0) + 1

    layers = {path: site.layer for path, site in observe.sites(model, config).items()}
    with observe.base_only(model, training=False), observe.inputs(layers, see):
        run()
    return {path: total / counts[path] for path, total in sums.items()}


def _runner(run_model: Callable[[], Any] | None) -> Callable[[], Any]:
    if run_model is None:
        raise ValueError(
            "CorDA needs data: give run_model, a function that runs the model over samples, or a "
            "corda_config whose cache_file or covariance_file has been written before"
        )
    return run_model


def _of(tensors: Mapping[str, Tensor], key: str, path: str) -> Tensor:
    if key not in tensors:
        raise StateError(
            f"no input reached {path} while run_model ran, or the cache is another config's; run "
            "the model itself in run_model, and leave layers that it does not call out of "
            "target_modules"
        )
    return tensors[key]
