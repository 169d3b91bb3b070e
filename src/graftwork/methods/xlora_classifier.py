"""The classifier of X-LoRA: from the last hidden state of a first pass to the experts' scalings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine import Beneath, Site
from ..engine.root import Grafted
from ..errors import StateError, TargetError
from ..hooks import need_all
from .xlora_verbs import Verbs

if TYPE_CHECKING:
    from .xlora import XLoraConfig

NUMBER = count()
FRONT = "internal_xlora_classifier.layers."


class Classifier(Verbs):
    """Linear layers with ReLU and dropout between them."""

    def __init__(self, config: XLoraConfig, sites: Sequence[Site]) -> None:
        super().__init__(config)
        for site in sites:
            if site.ones:
                raise TargetError(
                    f"X-LoRA scales tokens, and {site.path} {site.describe()} has none; use experts"
                    " without it"
                )
        self.places = {site.name: i for i, site in enumerate(sites)}
        self.name = f"scalings{next(NUMBER)}"  # of its values in a call
        ends = self.n * (len(sites) if config.layerwise_scalings else 1)
        inner = [config.xlora_size] * (config.xlora_depth - 1)
        layers: list[nn.Module] = []
        for a, b in pairwise([int(config.hidden_size or 0), *inner, ends]):
            drop = [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p else []
            layers += [nn.ReLU(), *drop] if layers else []
            layers.append(nn.Linear(a, b))
        self.layers = nn.Sequential(*layers)
        self.keys = {k: FRONT + k.removeprefix("layers.") for k in self.state_dict()}

    def before(self, root: Grafted, name: str, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Read the scalings off the last hidden state of the model with a constant scaling."""
        need_all("X-LoRA", kwargs)
        value = self.config.scaling_pass_value
        first: Any = torch.full((self.n,), value)
        asked = {**kwargs, "output_hidden_states": True, "return_dict": True}
        asked.pop("labels", None)
        with torch.no_grad(), root.switch.call((name,) if value else (), **{self.name: first}):
            states = getattr(root.model(*args, **asked), "hidden_states", None)
        if states is None:
            raise StateError(
                f"X-LoRA reads output.hidden_states[-1], and a {type(root.model).__name__} has none"
            )
        hidden = states[-1].to(self.dtype)  # (rows, positions, hidden)
        s: Tensor = self.layers(hidden).unflatten(-1, (-1, self.n))  # (..., layers or 1, experts)
        if self.config.enable_softmax:
            s = (s / self.config.softmax_temperature).softmax(-1)
        if not torch.compiler.is_compiling():
            self.latest = s.detach().expand(-1, -1, len(self.places), -1)
            self.log += [self.latest] if self.logging else []
        return {self.name: s}

    def of(self, layer: Beneath, x: Tensor, place: int) -> Tensor:
        """The scalings of the inputs x of one layer, (rows, positions, experts), with g."""
        s: Tensor | None = layer.context.get(self.name)
        if s is None:
            raise StateError(
                f"{layer.site.path} has no scalings: X-LoRA reads the model's own inputs, so call "
                "the PeftModel, not the model inside it"
            )
        s = (s if s.ndim == 1 else s[:, :, place if s.shape[2] > 1 else 0]).to(x.device)
        if s.ndim > 1 and s.shape[:2] != x.shape[:2]:
            raise StateError(
                f"{layer.site.path} has the inputs {tuple(x.shape)}, not one for each of the "
                f"tokens {tuple(s.shape[:2])} that X-LoRA has scaled; use experts without it"
            )
        if self.config.top_k_lora is not None:
            best = s.topk(self.config.top_k_lora, -1).indices
            s = s * torch.zeros_like(s).scatter(-1, best, 1.0)
        if self.config.enable_softmax_topk:  # among those that are not zero, where any is
            s = s.masked_fill(s == 0, -torch.inf).softmax(-1).nan_to_num(0.0)
        return self.config.global_scaling_weight * s.to(self.dtype)


def hidden_size(model: Any, wanted: int | None) -> int:
    """The channels of the model's last hidden state, checked against what the user says."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(text, "hidden_size", None)
    if known is None and wanted is None:
        raise ValueError(
            f"it is not known how wide the last hidden state of a {type(model).__name__} is; give "
            "hidden_size"
        )
    if wanted is not None and known is not None and wanted != known:
        raise ValueError(f"hidden_size={wanted}, but the model's is {known}; leave it out")
    return int(known or wanted or 0)
