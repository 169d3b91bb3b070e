"""The classifier of X-LoRA: from the last hidden state of a first pass to the experts' scalings."""

from __future__ import annotations

from functools import partialmethod
from itertools import pairwise
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from ..engine import Shared, Site
from ..engine.root import Grafted
from ..errors import StateError, TargetError
from ..hooks import need_all

FRONT = "internal_xlora_classifier.layers."


class Classifier(Shared):
    """Linear layers with ReLU and dropout between them; the public methods are PEFT's."""

    def __init__(self, config: Any, sites: list[Site]) -> None:
        super().__init__()
        if kernel := next((site for site in sites if site.ones), None):
            raise TargetError(
                f"X-LoRA scales tokens, and {kernel.path} {kernel.describe()} has none; use "
                "experts without it"
            )
        self.config, self.n = config, len(config.adapters)
        self.places = {site.name: i for i, site in enumerate(sites)}
        self.name = f"scalings-{uuid4()}"  # of its values in a call
        self.latest: Tensor | None = None
        self.log: list[Tensor] = []
        self.logging = False
        self.set_topk_lora(config.top_k_lora)
        ends = self.n * (len(sites) if config.layerwise_scalings else 1)
        inner = [config.xlora_size] * (config.xlora_depth - 1)
        layers: list[nn.Module] = []
        for a, b in pairwise([config.hidden_size, *inner, ends]):
            drop = [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p else []
            layers += [nn.ReLU(), *drop, nn.Linear(a, b)] if layers else [nn.Linear(a, b)]
        self.layers = nn.Sequential(*layers)
        self.keys = {k: FRONT + k.removeprefix("layers.") for k in self.state_dict()}

    get_latest_scalings = partialmethod(getattr, "latest")  # (rows, positions, layers, experts)
    enable_scalings_logging = partialmethod(setattr, "logging", True)
    disable_scalings_logging = partialmethod(setattr, "logging", False)  # the log stays

    def get_scalings_log(self) -> list[Tensor]:
        return list(self.log)

    def clear_scalings_log(self) -> None:
        self.log.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The scalings that were noted and their places in the log, by the number of positions."""
        places: dict[int, list[int]] = {}
        for i, s in enumerate(self.log):
            places.setdefault(s.shape[1], []).append(i)
        return {n: (found, [self.log[i] for i in found]) for n, found in places.items()}

    def set_topk_lora(self, value: int | None) -> None:
        if value is not None and not 1 <= value <= self.n:
            raise ValueError(f"top_k_lora={value} is not between 1 and the {self.n} experts")
        self.config.top_k_lora = value

    def set_scaling_pass_value(self, value: float | None) -> None:
        self.config.scaling_pass_value = 1 / self.n if value is None else value

    def set_global_scaling_weight(self, weight: float) -> None:
        self.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self.config.global_scaling_weight  # type: ignore[no-any-return]


def scalings(config: Any, root: Grafted, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """Read s off the last hidden state of the model with a constant s; ``{key: g s}``."""
    need_all("X-LoRA", kwargs)
    own, value = root.switch.shared[name], config.scaling_pass_value
    first: Any = {own.name: chosen(own, torch.full((own.n,), value))}
    asked = {**kwargs, "output_hidden_states": True, "return_dict": True}
    asked.pop("labels", None)
    with torch.no_grad(), root.switch.call((name,) if value else (), **first):
        states = getattr(root.model(*args, **asked), "hidden_states", None)
    if states is None:
        raise StateError(
            f"X-LoRA reads output.hidden_states[-1], and a {type(root.model).__name__} has none"
        )
    s = own.layers(states[-1].to(own.dtype)).unflatten(-1, (-1, own.n))
    if config.enable_softmax:
        s = (s / config.softmax_temperature).softmax(-1)
    if not torch.compiler.is_compiling():
        own.latest = s.detach().expand(-1, -1, len(own.places), -1)
        own.log += [own.latest] if own.logging else []
    return {own.name: chosen(own, s)}  # (rows, positions, layers or 1, experts)


def chosen(own: Classifier, s: Tensor) -> Tensor:
    """g s, of the experts that take part."""
    config = own.config
    if config.top_k_lora is not None:
        best = s.topk(config.top_k_lora, -1).indices
        s = s * torch.zeros_like(s).scatter(-1, best, 1.0)
    if config.enable_softmax_topk:  # among those that are not zero, where any is
        s = s.masked_fill(s == 0, -torch.inf).softmax(-1).nan_to_num(0.0)
    return config.global_scaling_weight * s.to(own.dtype)  # type: ignore[no-any-return]
