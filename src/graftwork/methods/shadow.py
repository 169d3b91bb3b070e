"""ShadowPEFT: h + a U D (h - s) in front of each block; behind it s <- (1 - g) s + g T(h), where
g = sigmoid(G(h)). The first s is what a small model beside the other makes of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Host
from ..engine.tree import inside
from ..errors import StateError, TargetError
from ..fields import probability, whole
from ..targets.offer import Offer, Target
from . import shadow_side as side


@dataclass
class ShadowConfig(TargetConfig, method="SHADOW", peft="exclude layers save"):
    """A small trained model that follows the frozen one from block to block, and corrects it."""

    r: int = whole(8)  # rank of U D
    shadow_alpha: float = 0.1  # a
    shadow_dropout: float = probability(0.2)  # probability, on h - s, in training
    init_weights: bool = True  # False: the correction does not start at zero
    shadow_model: str = "mirror"  # a smaller model of the same kind, or a folder or hub id of one
    shadow_num_hidden_layers: int | None = None  # of the mirror; None: one
    shadow_hidden_size: int | None = None  # of the mirror; None: the model's own, as the next two
    shadow_num_attention_heads: int | None = None  # of the mirror
    shadow_intermediate_size: int | None = None  # of the mirror
    share_embeddings: bool = True  # the mirror gets the model's embeddings, where widths agree
    update_hidden_size: int | None = None  # width within T and G; None: r
    auxiliary_loss_weight: float = 0.05  # of the loss of the small model's own answers

    OFFERS = frozenset({"unload_shadow", "last_shadow_loss"})
    SIZES = "num_hidden_layers hidden_size num_attention_heads intermediate_size".split()
    before, after = side.before, side.after

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in self.SIZES if getattr(self, f"shadow_{n}") is not None]
        if given and (other := self.shadow_model) != "mirror":
            raise ValueError(f"shadow_{given[0]} is for a mirror; {other} has a size of its own")

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        model: Any = offer.model
        if not hasattr(model, "get_decoder") or model.config.is_encoder_decoder:
            raise TargetError(
                f"a shadow follows one stack of transformer blocks, and a {type(model).__name__} "
                "is none that is known"
            )
        self.model, self.stack = model, inside(model.get_decoder())  # until ``share``

    def places(self, offer: Offer, path: str) -> list[Target]:
        return [Target(path, offer.modules[path])]

    def usual(self, offer: Offer) -> Any:
        within = set(self.stack.modules())
        lists = [m for m in offer.modules.values() if isinstance(m, nn.ModuleList) and m in within]
        longest = max(lists, key=len, default=())
        return {p for p in offer.modules if offer.modules.get(p.rpartition(".")[0]) is longest}

    def share(self, sites: Any) -> side.Side:
        return side.Side(self, vars(self).pop("model"), vars(self).pop("stack"))

    def build(self, host: Host, key: str, shared: Any) -> Adapter:
        if host.site_of(key) or isinstance(host.base_layer, (nn.ModuleList, nn.ModuleDict)):
            raise TargetError(
                f"a shadow follows whole blocks, and {host.path} is a "
                f"{type(host.base_layer).__name__}; name blocks, such as 'layers.0'"
            )
        return Shadow(self.at(host.path), host.path, shared)


class Shadow(Adapter, config=ShadowConfig):
    """D (r, width) and U (width, r), zero at the start; T and G, each of two layers."""

    beside, relays = True, ("T", "G")
    FORBIDS = {"merge": "its correction depends on the input and on earlier blocks"}

    def __init__(self, config: ShadowConfig, path: str, shared: side.Side) -> None:
        super().__init__(config, None, shared)
        width, r, inner = shared.width, config.r, config.update_hidden_size or config.r
        self.path, self.zero = path, config.init_weights
        self.D, self.U = nn.Linear(width, r, bias=False), nn.Linear(r, width, bias=False)
        self.T, self.G = (
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(2)
        )
        self.dropout, self.scale = nn.Dropout(config.shadow_dropout), config.shadow_alpha
        names = {"D": "down", "U": "up", "T": "update_transform", "G": "update_gate"}
        self.keys = {k: f"shadow_{names[k[0]]}.default.{k[2:]}" for k in self.state_dict()}

    def start(self, site: Any) -> None:
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            layer.reset_parameters()
        if self.zero:
            self.U.weight.zero_()

    def ahead(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        s = self.shared.front(self.path, context).to(x.dtype)
        if s.shape != x.shape:
            raise StateError(
                f"{self.path} has the inputs {tuple(x.shape)}, and the shadow {tuple(s.shape)}: it "
                "can follow blocks only that see the hidden state of each token"
            )
        return self.scale * self.U(self.D(self.dropout(x - s)))  # type: ignore[no-any-return]

    def passed(self, y: Tensor, context: dict[str, Any]) -> None:
        s, g = self.shared.front(self.path, context).to(y.dtype), self.G(y).sigmoid()
        context[self.shared.name][1][self.path] = s + g * (self.T(y) - s)
