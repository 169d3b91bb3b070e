"""The experts of X-LoRA: LoRAs in folders of their own, and their mixture at a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Adapter, Beneath, Site
from ..engine.tree import parameters
from ..errors import FileError, StateError, TargetError
from ..files import codec
from ..files.nested import Held
from ..targets.match import Match
from ..targets.offer import Offer

BESIDE = "modules_to_save trainable_token_indices target_parameters use_dora".split()


class Expert:
    """One LoRA on disk: its config, the layers that it adapts, its values until they are there."""

    def __init__(self, offer: Offer, held: Held) -> None:
        self.source = held.source
        config, self.values = held.take()
        plain = config.method == "LORA" and config.bias == "none"
        if not plain or any(getattr(config, name) for name in BESIDE):
            raise TargetError(
                f"{self.source} is no plain LoRA; X-LoRA mixes low-rank updates and nothing else, "
                f"such as {', '.join(BESIDE)} or bias"
            )
        config.prepare(offer)
        targets = Match(offer, config).targets()
        self.config, self.paths = config, {target.path for target in targets}
        if inner := next((target.name for target in targets if target.parameter), None):
            raise TargetError(
                f"{self.source} adapts {inner}, a parameter that its module's own code reads, and "
                "X-LoRA scales what layers give; use experts without it"
            )
        self.parts: list[Adapter] = []  # what it is at each layer
        base = dict(parameters(offer.model))
        fronts = tuple(f"{codec.PREFIX}{path}.lora_" for path in self.paths)
        for name in [name for name in self.values if not name.startswith(fronts)]:
            own = base.get(name.removeprefix(codec.PREFIX).replace(".base_layer.", "."))
            if own is None or not torch.equal(own.cpu(), self.values.pop(name).to(own.dtype)):
                raise FileError(f"{self.source} holds {name}, which is no part of a LoRA here")

    @torch.no_grad()
    def give(self, part: Adapter) -> None:
        """Give a part its values, once."""
        mine = {}
        for key, shape in part.expects(self.config).items():
            mine[key] = self.values.pop(part.prefix + key, torch.empty(0))
            if mine[key].shape != shape:
                raise FileError(
                    f"{self.source} does not fit this model: {part.prefix}{key} is not there in "
                    f"the shape {shape}"
                )
        part.take(mine, self.config)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors as they are now, by their names in a file."""
        every = [(part.prefix, part.file_tensors()) for part in self.parts]
        return {front + key: t.detach() for front, own in every for key, t in own.items()}


class XLoRA(Adapter):
    """The experts that have factors at this layer, by their number."""

    FORBIDS = {"merge": "its mixture depends on the input"}
    ready = stacked = True

    def __init__(self, config: Any, site: Site, shared: Any) -> None:
        super().__init__(config, site, shared)
        self.place, frozen = shared.places[site.name], not config.use_trainable_adapters
        self.experts: Any = nn.ModuleDict()
        here = [(i, e) for i, e in enumerate(shared.config.experts) if site.path in e.paths]
        for i, expert in here:
            self.experts[str(i)] = part = expert.config.build(site.host, "", None)
            part.derive(site)
            part.prefix = f"{codec.PREFIX}{site.path}."
            expert.give(part)
            expert.parts.append(part)
            for name, p in list(part.named_parameters()) if frozen else ():
                delattr(part, name)  # nothing that unfreezes an adapter finds a buffer
                setattr(part, name, nn.Buffer(p.data))

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        site, y, s = layer.site, layer(x), layer.context.get(self.shared.name)
        if s is None:
            raise StateError(
                f"{site.path} has no scalings: X-LoRA reads the model's own inputs, so call the "
                "PeftModel, not the model inside it"
            )
        s = (s if s.ndim == 1 else s[:, :, self.place if s.shape[2] > 1 else 0]).to(x.device)
        if s.ndim > 1 and s.shape[:2] != x.shape[:2]:
            raise StateError(
                f"{site.path} has the inputs {tuple(x.shape)}, not one for each of the tokens "
                f"{tuple(s.shape[:2])} that X-LoRA has scaled; use experts without it"
            )
        for i, expert in self.experts.items():
            a, b, bias = expert.factored()
            u = site.low_rank(expert.dropped(x), a, b) + (0 if bias is None else bias)
            y = y + s[..., int(i), None] * u
        return y

    def file_tensors(self) -> dict[str, Tensor]:
        return {}

    def rank(self) -> int:
        return max(int(expert.rank()) for expert in self.experts.values())

    def delta_norm(self, w: Tensor) -> float:
        return math.hypot(*(expert.delta_norm(w) for expert in self.experts.values()))
