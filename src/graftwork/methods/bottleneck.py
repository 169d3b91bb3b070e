"""Bottleneck adapters: y + s U f(D y) behind a module (Houlsby, arXiv 1902.00751; Pfeiffer,
arXiv 2005.00247), or y + s U f(D x) in parallel to it (arXiv 2110.04366).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Host, Shared
from ..engine.site import ParameterSite, Standing, kind_of
from ..errors import TargetError
from ..fields import choice, probability, whole
from ..targets.defaults import BOTTLENECK
from ..targets.offer import Offer, Target

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


@dataclass
class BottleneckConfig(TargetConfig, method="BOTTLENECK", peft="exclude save layers"):
    """Small networks behind, or in parallel to, layers or whole modules.

    Args:
        kind: "houlsby": behind attention and feed-forward; "pfeiffer": behind the latter;
            "parallel": beside what target_modules names.
    """

    kind: str = choice("houlsby", "pfeiffer", "parallel")
    reduction_factor: int = whole(16)  # the bottleneck has the input's width divided by it
    non_linearity: str = choice(*FUNCTIONS)  # between the two matrices
    scaling: float = 1.0  # s
    adapter_dropout: float = probability(0.0)  # probability, on the input, in training

    def places(self, offer: Offer, path: str) -> list[Target]:
        here = Target(path, offer.modules[path])
        attention = isinstance(here.module, nn.MultiheadAttention)  # behind it, not at its weights
        return [here] if attention else offer.targets(path) or [here]

    def usual(self, offer: Offer) -> Any:
        known = BOTTLENECK.get(offer.model_type)
        if known is None or self.kind == "parallel":
            raise TargetError(
                f"it is not known where bottlenecks of the kind {self.kind!r} go in a "
                f"{type(offer.model).__name__}: name layers or modules in target_modules. "
                + offer.table()
            )
        ends = known[-1:] if self.kind == "pfeiffer" else known
        return rf"(.*\.)?({'|'.join(ends)})"

    def build(self, host: Host, key: str, shared: Shared | None) -> Adapter:
        site = host.site_of(key)
        if isinstance(site, ParameterSite):
            reason = Bottleneck.FORBIDS["merge"]
            raise TargetError(f"a bottleneck cannot sit at the parameter {site.name}: {reason}")
        return Bottleneck(self.at(host.path), *widths(host))


def widths(host: Host) -> tuple[int, int, bool]:
    """Channels that a module takes and gives, and whether they stand on the second axis."""
    layers = [m for m in host.base_layer.modules() if kind_of(m)]
    if not layers:
        raise TargetError(f"{host.path} has no layer that tells how wide it is")
    sites = [kind(Standing(m)) for m in layers if (kind := kind_of(m)) is not None]
    return sites[0].in_channels, sites[-1].shape[0], bool(sites[0].ones)


class Bottleneck(Adapter, config=BottleneckConfig):
    """D (k, width), U (out, k) with biases d (k,) and u (out,); U and u are zero at the start."""

    keys = {
        "D": "adapter_down.weight", "d": "adapter_down.bias",
        "U": "adapter_up.weight", "u": "adapter_up.bias",
    }  # fmt: skip
    beside = True
    FORBIDS = {
        "merge": "a nonlinearity stands between its two matrices, so no weight does the same"
    }

    def __init__(self, config: BottleneckConfig, in_: int, out: int, second: bool) -> None:
        super().__init__()
        self.parallel, self.second = config.kind == "parallel", second
        width = in_ if self.parallel else out
        k = max(1, width // config.reduction_factor)
        self.D, self.d = nn.Parameter(torch.empty(k, width)), nn.Parameter(torch.empty(k))
        self.U, self.u = nn.Parameter(torch.empty(out, k)), nn.Parameter(torch.empty(out))
        self.f, self.scale = FUNCTIONS[config.non_linearity], config.scaling
        self.dropout = nn.Dropout(config.adapter_dropout)

    def start(self, site: Any) -> None:
        nn.init.kaiming_uniform_(self.D, a=5**0.5)
        for p in (self.d, self.U, self.u):
            p.zero_()

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        z = x if self.parallel else y
        z = z.movedim(1, -1) if self.second else z
        h = self.f(F.linear(self.dropout(z), self.D, self.d))
        out = self.scale * F.linear(h, self.U, self.u)
        return out.movedim(-1, 1) if self.second else out

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        y = layer(x)
        return y + self.added(x, y)

    def delta_norm(self, w: Tensor) -> float:
        return float("nan")
