"""ShadowPEFT: h + a U D (h - s) in front of each block; behind it s <- (1 - g) s + g T(h), where
g = sigmoid(G(h)). The first s is what a small model beside the other makes of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Host
from ..engine.root import Grafted
from ..engine.site import kind_of
from ..errors import StateError, TargetError
from ..fields import probability, whole
from ..targets.offer import Offer, Target
from .shadow_side import Plan, Side


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

    def __post_init__(self) -> None:
        super().__post_init__()
        own = "num_hidden_layers hidden_size num_attention_heads intermediate_size".split()
        given = [n for n in own if getattr(self, f"shadow_{n}") is not None]
        if given and self.shadow_model != "mirror":
            raise ValueError(
                f"shadow_{given[0]} is for a mirror; {self.shadow_model} has a size of its own"
            )
        self.plan: Plan | None = None

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        self.plan = Plan.of(self, offer)

    def places(self, offer: Offer, path: str) -> list[Target]:
        return [Target(path, offer.modules[path])]

    def usual(self, offer: Offer) -> Any:
        assert self.plan is not None
        return set(self.plan.blocks)

    def share(self, sites: Any) -> Side:
        plan, self.plan = self.plan, None
        assert plan is not None
        return Side(self, plan)

    def build(self, host: Host, key: str, shared: Any) -> Adapter:
        if kind_of(host.base_layer) or isinstance(host.base_layer, (nn.ModuleList, nn.ModuleDict)):
            raise TargetError(
                f"a shadow follows whole blocks, and {host.path} is a "
                f"{type(host.base_layer).__name__}; name blocks, such as 'layers.0'"
            )
        return Shadow(self, host.path, shared)

    def before(self, root: Grafted, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        return root.switch.shared[name].before(root, name, args, kwargs)  # type: ignore[no-any-return]

    def after(self, root: Grafted, name: str, outputs: Any, args: Any, kwargs: Any) -> Any:
        return root.switch.shared[name].after(root, outputs, args, kwargs)


class Shadow(Adapter, config=ShadowConfig):
    """D (r, width) and U (width, r), zero at the start; T and G, each of two layers."""

    beside = True
    FORBIDS = {"merge": "its correction depends on the input and on earlier blocks"}

    def __init__(self, config: ShadowConfig, path: str, shared: Side) -> None:
        super().__init__(config, None, shared)
        width, r, inner = shared.width, config.r, config.update_hidden_size or config.r
        self.path, self.place, self.zero = path, shared.place(path), config.init_weights
        self.D, self.U = nn.Linear(width, r, bias=False), nn.Linear(r, width, bias=False)
        self.T, self.G = (
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(2)
        )
        self.dropout, self.scale = nn.Dropout(config.shadow_dropout), config.shadow_alpha
        names = {"D": "down", "U": "up", "T": "update_transform", "G": "update_gate"}
        self.keys = {k: f"shadow_{names[k[0]]}.default.{k[2:]}" for k in self.state_dict()}

    def start(self, site: Any) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        if self.zero:
            self.U.weight.zero_()

    def ahead(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        s = self.shared.state(context, self.place).to(x.dtype)
        if s.shape != x.shape:
            raise StateError(
                f"{self.path} has the inputs {tuple(x.shape)}, and the shadow {tuple(s.shape)}: it "
                "can follow blocks only that see the hidden state of each token"
            )
        return self.scale * self.U(self.D(self.dropout(x - s)))  # type: ignore[no-any-return]

    def passed(self, y: Tensor, context: dict[str, Any]) -> None:
        s, g = self.shared.state(context, self.place).to(y.dtype), self.G(y).sigmoid()
        self.shared.trail(context)[self.place + 1] = s + g * (self.T(y) - s)

    def delta_norm(self, w: Tensor) -> float:
        return float("nan")
