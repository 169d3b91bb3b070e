"""PEFT's ``peft.helpers``."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.dense import dense
from ..engine.root import Grafted
from ..engine.tree import inside, parameters, walk
from ..methods.adalora import AdaLoRA
from ..methods.lora import LoRA

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class MontecloraTrainerMixin:
    """PEFT's way to a Trainer that adds MonteCLoRA's penalty; here every Trainer does, and this
    changes nothing.
    """


class DoraCaching:
    """PEFT's switch for remembering DoRA's norms; here ``merge_adapter()`` makes inference fast,
    and this changes nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, enabled: bool = True) -> None:
        self.enabled = enabled


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """PEFT's; hosts cast at the border, to an adapter's own dtype and back, and this changes
    nothing.
    """
    yield


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block the updates of LoRA and AdaLoRA are ``multiplier`` times as large.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has neither.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"multiplier is a number, not a {type(multiplier).__name__}")
    parts = [m for m in model.modules() if isinstance(m, (LoRA, AdaLoRA))]
    scales = [part.scale for part in parts]
    if not parts:
        raise ValueError(
            "LoRA and AdaLoRA have a scale, and this model has neither, so there is nothing to "
            "rescale; leave rescale_adapter_scale out"
        )
    try:
        for part, scale in zip(parts, scales, strict=True):
            part.scale = scale * multiplier
        yield
    finally:
        for part, scale in zip(parts, scales, strict=True):
            part.scale = scale


def update_forward_signature(model: nn.Module) -> None:
    """Let a model's ``forward`` show the arguments of the base model's."""
    _show(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Let a model's ``generate`` show the arguments of the base model's."""
    _show(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Let "forward", "generate" or "all" show the arguments of the base model's.

    Raises:
        ValueError: the method is none of those.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method={method!r} is not known; it is forward, generate or all")
    for name in ("forward", "generate") if method == "all" else (method,):
        _show(model, name)


def _show(model: Any, name: str) -> None:
    own: Any = getattr(type(model), name, None)
    theirs: Any = getattr(type(model.get_base_model()), name, None)
    if own is None or theirs is None:
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    shown: Callable[..., Any] = functools.update_wrapper(call, theirs)
    setattr(model, name, types.MethodType(shown, model))


class KappaTuneSelector:
    """Chooses targets by their condition numbers: the smallest forget least.

    Args:
        model: the base model.
        max_dim_size_to_analyze: weights with a longer side are left out.
        moe_param_suffixes: what names of stacked experts end with.
        show_progress: PEFT's option.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        ends = moe_param_suffixes or EXPERTS
        linear = {p: inside(m) for p, m in walk(model) if isinstance(inside(m), nn.Linear)}
        weights = {path: dense(module.weight) for path, module in linear.items()}  # type: ignore[arg-type]
        stacks = {n: p for n, p in parameters(model) if p.ndim == 3 and n.endswith(ends)}
        self.modules = _condition(weights, max_dim_size_to_analyze)
        self.parameters = _condition(stacks, max_dim_size_to_analyze)

    def get_best_targets(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """Linear layers: so many, or else that share, or else those up to a condition number."""
        return _best(self.modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """Stacked experts, in the same way."""
        return _best(self.parameters, top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """``target_modules`` and ``target_parameters``: the share ``top_p`` of the smallest condition
    numbers; see ``KappaTuneSelector``.
    """
    found = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": found.get_best_targets(top_p),
        "target_parameters": found.get_best_target_parameters(top_p) or None,
    }


@torch.no_grad()
def _condition(weights: dict[str, Tensor], longest: int) -> dict[str, float]:
    """Name -> the ratio of the extreme singular values, of stacked weights the mean."""
    found = {}
    for name, weight in weights.items():
        if max(weight.shape[-2:]) <= longest:
            s = torch.linalg.svdvals(weight.float())  # (..., min(out, in))
            found[name] = float((s[..., 0] / (s[..., -1] + 1e-8)).mean())
    return found


def _best(
    found: dict[str, float], top_p: float | None, count: int | None, most: float | None
) -> list[str]:
    names = sorted(found, key=lambda name: found[name])
    if count is None and top_p is not None:
        count = max(1, int(len(names) * top_p))
    if count is not None:
        return names[:count]
    return [name for name in names if most is None or found[name] <= most]


def by_hand(root: Grafted, option: str) -> Callable[..., Any]:
    """What PEFT's programs add to a loss themselves: the penalty of the variant of ``option``."""

    def penalty(adapter_names: str | Sequence[str] | None = None) -> Any:
        """The penalties of adapters, the active ones by default, as far as no loss has them."""
        names = root.active_adapters if adapter_names is None else adapter_names
        names = [names] if isinstance(names, str) else names
        chosen = [s for n, s in root.switch.schedules.items() if n in names]
        return sum((s.hand() for s in chosen if getattr(s.config, option, None)), 0.0)

    return penalty
