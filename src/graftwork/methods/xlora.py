"""X-LoRA (arXiv 2402.07148): y + g sum_i s_i B_i A_i x, a mixture of trained LoRAs whose s (one for
each token, at will for each layer) a classifier reads off a first pass through the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import TargetConfig
from ..engine.inject import switch_of
from ..fields import probability, whole
from ..files import nested
from ..targets.offer import Offer
from .xlora_classifier import FRONT, Classifier, scalings
from .xlora_experts import Expert, XLoRA


@dataclass
class XLoraConfig(TargetConfig, method="XLORA", peft=""):
    """Trained LoRAs, mixed for each token; they stand in the order of their names."""

    hidden_size: int | None = None  # of the model's last hidden state; None: the model's config
    adapters: dict[str, str] = field(default_factory=dict)  # {name: folder or hub id of a LoRA}
    enable_softmax: bool = True  # the scalings of all experts add up to one
    enable_softmax_topk: bool = False  # those of the chosen ones do
    layerwise_scalings: bool = False  # each layer has scalings of its own
    xlora_depth: int = whole(1)  # linear layers of the classifier
    xlora_size: int = whole(2048)  # width between them
    xlora_dropout_p: float = probability(0.2)  # probability, in training, between them
    use_trainable_adapters: bool = False  # the experts train too
    softmax_temperature: float = 1.0  # of the softmax over experts; lower is sharper
    top_k_lora: int | None = None  # so many experts a token; None: all
    scaling_pass_value: float = 0.0  # every scaling in the first pass
    global_scaling_weight: float = 1.0  # g

    ADAPTER, before = XLoRA, scalings
    OFFERS = frozenset(name for name in vars(Classifier) if not name.startswith("_"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapters = nested.in_order(self.adapters or {})
        self.nested: dict[str, nested.Held] = {}  # where the experts are that came with it
        self.experts: list[Expert] = []

    def found(self, source: Any) -> dict[str, Tensor]:
        self.nested = nested.within(source, self.adapters)
        elsewhere = nested.strayed(self.nested, FRONT)
        self.nested = {} if elsewhere else self.nested
        return elsewhere

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        if self.overrides:
            raise ValueError("overrides has no meaning: one classifier scales all layers")
        config, wanted = getattr(offer.model, "config", None), self.hidden_size
        text = getattr(config, "get_text_config", lambda: config)()
        self.hidden_size = known = getattr(text, "hidden_size", None) or wanted
        if known is None:
            raise ValueError(
                "it is not known how wide the last hidden state of a "
                f"{type(offer.model).__name__} is; give hidden_size"
            )
        if wanted not in (None, known):
            raise ValueError(f"hidden_size={wanted}, but the model's is {known}; leave it out")
        self.experts = self.read(offer)
        self.target_modules = "|".join(re.escape(p) for e in self.experts for p in e.paths)

    def read(self, offer: Offer) -> list[Expert]:
        """The experts, in their order."""
        if not self.adapters:
            raise ValueError(
                "X-LoRA mixes trained LoRAs; name them: "
                "XLoraConfig(adapters={'math': 'folder', ...})"
            )
        held = {n: self.nested.get(n) or nested.Held(where) for n, where in self.adapters.items()}
        return [Expert(offer, held[name]) for name in self.adapters]

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "target_modules"}

    def share(self, sites: Any) -> Classifier:
        return Classifier(self, sites)

    def folders(self, model: Any, name: str) -> dict[str, tuple[Any, dict[str, Tensor]]]:
        files = [(expert.config, expert.tensors()) for expert in self.experts]
        return dict(zip(self.adapters, files, strict=True))

    def fill(self, model: Any, name: str) -> None:
        switch: Any = switch_of(model)
        here = switch.configs[name].experts
        for expert, new in zip(here, self.read(Offer(model)), strict=True):
            for part in expert.parts:
                new.give(part)
