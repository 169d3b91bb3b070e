"""Running the user's data through the user's model, and looking on."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inject import switch_of
from ..engine.site import Site, Standing, kind_of
from ..model.functional import user_model
from ..targets.match import Match
from ..targets.offer import Offer
from . import MATRICES


def sites(model: nn.Module, config: Any, how: str = "") -> dict[str, Site]:
    """The layers that a config means and at which starts from data are known, by path.

    Raises:
        ValueError: there are none, or the config names another start than ``how``.
    """
    if how and config.init_lora_weights != how:
        raise ValueError(
            f"the config has init_lora_weights={config.init_lora_weights!r}, so what is computed "
            f"here would have no effect; give one with init_lora_weights={how!r}"
        )
    config, offer = copy.deepcopy(config), Offer(user_model(model))
    config.prepare(offer)
    config.target_modules = Match(offer, config).resolved()
    places = {t.path: t.module for t in Match(offer, config).targets() if t.parameter is None}
    kinds = {path: kind_of(module) for path, module in places.items()}
    found = {p: kind(Standing(places[p], p)) for p, kind in kinds.items() if kind in MATRICES}
    if not found:
        raise ValueError(
            f"none of {sorted(places)[:4]} is a linear layer or a Conv1D, and only those start "
            f"from data. {offer.table()}"
        )
    return found


@contextmanager
def base_only(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block the model runs without adapters, in training mode or not."""
    modes = {module: module.training for module in model.modules()}
    switch = switch_of(user_model(model))
    model.train(training)
    try:
        if switch is None:
            yield
        else:
            with switch.call(()):
                yield
    finally:
        for module, before in modes.items():
            module.training = before


@contextmanager
def inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Any], None]) -> Iterator[None]:
    """Within the block, ``see(path, inputs)`` is called whenever a layer has been."""

    def hook(path: str) -> Callable[..., None]:
        def called(module: nn.Module, given: Any, output: Any) -> None:
            see(path, given)

        return called

    hooks = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def gradients(
    model: nn.Module, found: Mapping[str, Site], train_step: Callable[[], Any]
) -> dict[str, Tensor]:
    """The mean gradient of each weight W (out, in) over the backward passes of ``train_step``."""
    sums: dict[Tensor, Tensor] = {}
    counts: Counter[Tensor] = Counter()

    def arrived(p: Tensor) -> None:
        assert p.grad is not None
        sums[p] = sums[p] + p.grad.float() if p in sums else p.grad.float()
        counts[p] += 1
        p.grad = None  # there is never more than one layer's gradient beside the sums

    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    weights = {site.raw for site in found.values()}
    for p in before:
        p.requires_grad_(p in weights).grad = None
    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in weights]  # type: ignore[no-untyped-call]
    try:
        with base_only(model, training=True), torch.enable_grad():
            train_step()
    finally:
        for handle in hooks:
            handle.remove()
        for p, (trained, grad) in before.items():
            p.requires_grad_(trained).grad = grad
    mean = {path: sums[s.raw] / counts[s.raw] for path, s in found.items() if s.raw in sums}
    return {path: found[path].to_matrix(g) for path, g in mean.items()}


def recall(file: str | os.PathLike[str] | None, device: torch.device) -> dict[str, Tensor] | None:
    """The tensors of a cache of PEFT's, read without running code; None where there is none."""
    if file is None or not os.path.isfile(file) or not os.path.getsize(file):
        return None
    tensors: dict[str, Tensor] = torch.load(file, device, weights_only=True)
    return tensors


def remember(file: str | os.PathLike[str] | None, tensors: Mapping[str, Tensor]) -> None:
    """Write such a cache, where one is wished."""
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(tensors), file)
