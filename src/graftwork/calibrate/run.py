"""Runs of the base model: what its layers are given, and which gradients their weights get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inject import switch_of
from ..engine.site import Site
from ..model.functional import user_model
from ..targets.replicas import NOBODY


@contextmanager
def base_only(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block the model runs without adapters, in training mode or not."""
    modes = {module: module.training for module in model.modules()}
    switch = switch_of(user_model(model))
    model.train(training)
    try:
        with nullcontext() if switch is None else switch.call(NOBODY):
            yield
    finally:
        for module, before in modes.items():
            module.training = before


def inputs(
    model: nn.Module,
    found: Mapping[str, Site],
    run: Callable[[], Any],
    see: Callable[[str, Any], None],
) -> None:
    """Call ``see(path, inputs)`` whenever ``run`` has called one of these layers of a model."""

    def called(path: str, module: nn.Module, given: Any, output: Any) -> None:
        see(path, given)

    with base_only(model, training=False), ExitStack() as hooks:
        for path, site in found.items():
            hooks.callback(site.layer.register_forward_hook(partial(called, path)).remove)
        run()


def covariances(
    model: nn.Module, found: Mapping[str, Site], run: Callable[[], Any], half: bool = False
) -> dict[str, Tensor]:
    """E[x x'] (in, in) of the inputs x of layers while ``run`` runs the model, by path.

    Each batch is divided by its largest entry, as in CorDA's code (arXiv 2406.05223); ``half``: in
    the inputs' own precision.

    Raises:
        ValueError: the inputs of a layer are not finite, or all zero.
    """
    seen: dict[str, list[Any]] = {}  # path -> the sum over batches, and their number

    def see(path: str, given: Any) -> None:
        x = given[0].detach().reshape(-1, given[0].shape[-1])  # (n, in)
        x = x if half else x.float()
        x = x / x.max().abs()
        c = x.mT @ x
        if not torch.isfinite(c).all():
            raise ValueError(
                f"the inputs of {path} are not finite, or all zero; look at the data, or leave "
                "use_float16_for_covariance out"
            )
        total, n = seen.get(path, (0, 0))
        seen[path] = [total + c, n + 1]

    inputs(model, found, run, see)
    return {path: total / n for path, (total, n) in seen.items()}


def gradients(
    model: nn.Module, found: Mapping[str, Site], train_step: Callable[[], Any]
) -> dict[str, Tensor]:
    """The mean gradient of each weight, as it is stored, over ``train_step``'s backward passes."""
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
    try:
        with base_only(model, training=True), torch.enable_grad(), ExitStack() as hooks:
            for w in weights:
                hooks.callback(w.register_post_accumulate_grad_hook(arrived).remove)  # type: ignore[no-untyped-call]
            train_step()
    finally:
        for p, (trained, grad) in before.items():
            p.requires_grad_(trained).grad = grad
    return {path: sums[s.raw] / counts[s.raw] for path, s in found.items() if s.raw in sums}
