"""LLaMA-Adapter (arXiv 2303.16199): in the last attentions softmax(q K') V + g softmax(q P_k') P_v,
P_k and P_v the model's own keys and values of a trained prompt P, g a gate that starts at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Host
from ..errors import StateError, TargetError
from ..fields import whole
from ..targets.offer import Offer, Target, leaf
from .attention import acting, attends, install
from .layers import self_attentions

PAIRS = (("k_proj", "v_proj"), ("key", "value"), ("key_proj", "value_proj"), ("k", "v"))


def projections(module: nn.Module) -> tuple[Any, Any] | None:
    """The layers that make an attention's keys and values, where there is one for each."""
    every = (tuple(getattr(module, name, None) for name in names) for names in PAIRS)
    return next((pair for pair in every if None not in pair), None)  # type: ignore[return-value]


class Gated(Adapter):
    """P (1, length, width) and g (1), in one attention."""

    keys = {"P": "adaption_prompt", "g": "adaption_gate"}
    beside = inside = True
    FORBIDS = {
        "merge": "it attends to its prompt, which no weight of a layer does",
        "weighted": "each has a softmax and a gate of its own",
    }

    def __init__(self, config: AdaptionPromptConfig, host: Host, width: int) -> None:
        super().__init__(config)
        install(host.base_layer)
        self.host = (host,)  # in a tuple: referred to, not owned
        self.P = nn.Parameter(torch.empty(1, config.adapter_len or 1, width))
        self.g = nn.Parameter(torch.empty(1))

    def start(self, site: Any) -> None:
        self.P.normal_()
        self.g.zero_()

    def pair(self, module: Any, q: Tensor, apart: bool) -> list[Tensor]:
        """P_k and P_v, (1, heads, length, size); ``apart``: by the base model's weights, since each
        row of the batch has its own adapters.
        """
        x = self.P.to(q)
        with self.host[0].switch.call((), None) if apart else nullcontext():
            if hasattr(module, "c_attn"):
                pair = module.c_attn(x)[..., module.split_size :].chunk(2, dim=-1)
            else:
                pair = tuple(project(x) for project in projections(module) or ())
        return [t.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2) for t in pair]

    def around(
        self,
        run: Callable[[], Any],
        module: Any,
        parts: Sequence[Any],
        choice: Tensor | None,
    ) -> Any:
        more: list[Tensor] = []  # as PEFT: in GPT-2 behind the output's projection, without it

        def act(attend: Any, module: nn.Module, q: Tensor, *args: Any, **kwargs: Any) -> Any:
            out, scaling = attend(module, q, *args, **kwargs), kwargs.get("scaling")
            y: Any = 0
            for i, part in enumerate(parts):
                pair = part.pair(module, q, choice is not None)
                one = part.weigh(q, *pair, scaling or q.shape[-1] ** -0.5)
                y = y + (one if choice is None else one * (choice == i)[:, None, None, None])
            if hasattr(module, "c_attn"):
                more.append(y.flatten(2))
                return out
            return (out[0] + y.reshape(out[0].shape).to(out[0]), *out[1:])

        with acting(module, act):
            out = run()
        return (out[0] + more[0].to(out[0]), *out[1:]) if more else out

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """g softmax(q P_k') P_v, (batch, queries, heads, size)."""
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        weights = (q @ k.mT * scaling).softmax(-1, dtype=torch.float32).to(q)
        return (self.g.to(q) * weights @ v).transpose(1, 2)

    def delta_norm(self, w: Tensor) -> float:
        return float("nan")


@dataclass
class AdaptionPromptConfig(TargetConfig, method="ADAPTION_PROMPT", peft=""):
    """Prompts to which the last attentions attend as well, through gates.

    Args:
        target_modules: the name of the attentions; None: those over the model's own tokens.
        adapter_len: how long a prompt is; None: 10, as in the paper.
        adapter_layers: how many attentions, the last ones; None: all but the first two.
    """

    adapter_len: int | None = whole(None)
    adapter_layers: int | None = whole(None)

    is_adaption_prompt = True
    COMBINES = "prompts with gates of their own"

    def combined(self, *_: Any) -> Any:
        raise StateError(
            f"adaption prompts cannot be one, since {Gated.FORBIDS['weighted']}; make them "
            "active together instead: set_adapter([...])"
        )

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        if self.target_parameters:
            raise TargetError(
                "a prompt stands in whole attentions, and target_parameters names parameters; "
                "leave it out"
            )
        name, self.adapter_len = self.target_modules, self.adapter_len or 10
        every = [p for p in self_attentions(offer) if self.places(offer, p)]
        names = {name} if isinstance(name, str) else name
        chosen = [p for p in every if not names or any(f".{p}".endswith(f".{n}") for n in names)]
        most = len(chosen)
        if not chosen:
            raise TargetError(
                f"target_modules={name!r} names no attention that a prompt can be put into, one "
                "that has a layer for keys and one for values, or GPT-2's; the model has "
                f"{sorted(set(map(leaf, every))) or 'none'}"
            )
        self.adapter_layers = self.adapter_layers or max(1, most - 2)
        if self.adapter_layers > most:
            raise TargetError(
                f"adapter_layers={self.adapter_layers}, and the model has {most} such attentions; "
                f"try adapter_layers={max(1, most - 2)}"
            )
        self.target_modules = set(chosen[-self.adapter_layers :])

    def places(self, offer: Offer, path: str) -> list[Target]:
        module = offer.modules[path]
        fits = attends(module) and (projections(module) or hasattr(module, "c_attn"))
        return [Target(path, module)] if fits else []

    def build(self, host: Host, key: str, shared: Any) -> Adapter:
        module: Any = host.base_layer
        pair = projections(module)
        return Gated(self.at(host.path), host, pair[0].in_features if pair else module.embed_dim)

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()  # PEFT wants one name, and takes the last layers itself
        names = sorted({leaf(p) for p in found["target_modules"] or ()})
        if not self.layers_to_transform:  # PEFT has none, and beside them a name stands in a list
            return {**found, "target_modules": names[0] if len(names) == 1 else None}
        return {**found, "target_modules": names}
