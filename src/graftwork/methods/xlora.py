"""X-LoRA (arXiv 2402.07148): y + g sum_i s_i B_i A_i x, a mixture of trained LoRAs whose s (one for
each token, at will for each layer) a classifier reads off a first pass through the model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import OPTIONAL, TargetConfig
from ..engine import Adapter, Beneath, Host, Site
from ..engine.root import Grafted
from ..fields import probability, whole
from ..files import nested
from ..targets.offer import Offer
from . import xlora_experts as disk
from .xlora_classifier import FRONT, Classifier, hidden_size
from .xlora_verbs import VERBS


@dataclass
class XLoraConfig(TargetConfig, method="XLORA"):
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

    BEYOND = OPTIONAL
    OFFERS = VERBS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapters = nested.in_order(self.adapters or {})
        self.nested: dict[str, tuple[str, str]] = {}  # where the experts are that came with it
        self.experts: list[disk.Expert] = []

    def found(self, source: Any) -> dict[str, Tensor]:
        self.nested = nested.within(source, self.adapters)
        elsewhere = nested.strayed(self.nested, FRONT)
        self.nested = {} if elsewhere else self.nested
        return elsewhere

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        self.hidden_size = hidden_size(offer.model, self.hidden_size)
        self.experts = disk.read(self, offer)
        self.target_modules = "|".join(re.escape(p) for e in self.experts for p in e.paths)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "target_modules"}

    def share(self, sites: Any) -> Classifier:
        return Classifier(self, sites)

    def build(self, host: Host, key: str, shared: Any) -> Adapter:
        return XLoRA(self, host.need_site(key), shared)

    def before(self, root: Grafted, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        return root.switch.shared[name].before(root, name, args, kwargs)  # type: ignore[no-any-return]

    folders, fill = disk.folders, disk.fill


class XLoRA(Adapter, config=XLoraConfig):
    """The experts that have factors at this layer, by their number."""

    FORBIDS = {"merge": "its mixture depends on the input"}
    ready = True

    def __init__(self, config: XLoraConfig, site: Site, shared: Classifier) -> None:
        super().__init__(config, site, shared)
        self.place = shared.places[site.name]
        self.experts = nn.ModuleDict()
        for i, expert in enumerate(config.experts):
            if site.path in expert.paths:
                self.experts[str(i)] = expert.at(site, trains=config.use_trainable_adapters)

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        site, y = layer.site, layer(x)
        s = self.shared.of(layer, x, self.place)  # (rows, positions, experts)
        for i, expert in self.parts():
            a, b, bias = expert.factored()
            u = site.low_rank(expert.dropped(x), a, b) + (0 if bias is None else bias)
            y = y + s[..., i, None] * u
        return y

    def file_tensors(self) -> dict[str, Tensor]:
        return {}

    def rank(self) -> int:
        return max(int(expert.rank()) for _, expert in self.parts())

    def delta_norm(self, w: Tensor) -> float:
        return math.hypot(*(expert.delta_norm(w) for _, expert in self.parts()))

    def parts(self) -> list[tuple[int, Any]]:
        return [(int(i), expert) for i, expert in self.experts.items()]
