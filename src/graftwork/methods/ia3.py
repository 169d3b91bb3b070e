"""IA3 (arXiv 2205.05638): y = l * (W x + b), or W (l * x) + b in feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig, pattern_matches
from ..engine import Adapter, Beneath, Site
from ..fast import scaled
from ..targets.defaults import IA3_FEEDFORWARD


@dataclass
class IA3Config(TargetConfig, method="IA3", peft="exclude fan save"):
    """Learned gains, of the outputs; of the inputs in ``feedforward_modules``."""

    feedforward_modules: Any = None  # names or a regex, of some of the target layers
    init_ia3_weights: bool = True  # False: random gains

    SUBSETS = ("feedforward_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)

    def settle(self, model_type: str, paths: Sequence[str]) -> None:
        if self.feedforward_modules is None:
            known = IA3_FEEDFORWARD.get(model_type, [])
            self.feedforward_modules = {n for n in known if any(self.means(n, p) for p in paths)}

    def means(self, entry: str, path: str) -> bool:
        if isinstance(self.feedforward_modules, str):
            return pattern_matches(entry, path)
        return super().means(entry, path)

    def feeds_forward(self, path: str) -> bool:
        """Whether the layer at ``path`` is scaled at its input."""
        names = self.feedforward_modules or ()
        return any(self.means(n, path) for n in ([names] if isinstance(names, str) else names))


class IA3(Adapter, config=IA3Config):
    """One gain per output channel, or per input channel."""

    keys = {"l": "ia3_l"}
    native = True

    def __init__(self, config: IA3Config, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.feedforward = config.feeds_forward(site.path)
        self.random = not config.init_ia3_weights
        index = site.input_channel()  # which channel an entry of W reads, where not its column
        self.index = None if index is None else nn.Buffer(index, persistent=False)
        n = site.in_channels if self.feedforward else site.shape[0]
        linear = (1, n) if self.feedforward else (n, 1)
        self.l = nn.Parameter(torch.empty((1, n, *site.ones) if site.ones else linear))

    def start(self, site: Site) -> None:
        nn.init.normal_(self.l) if self.random else nn.init.ones_(self.l)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gains = self.l.flatten()
        if self.feedforward:
            return w * (gains if self.index is None else gains[self.index]), b
        return w * gains[:, None], b if b is None else b * gains

    def gains(self) -> tuple[Tensor | None, Tensor | None]:
        gains = self.l.flatten()
        return (gains, None) if self.feedforward else (None, gains)

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        gains = self.l.flatten()
        if not self.feedforward:
            return scaled(layer(x), layer.site.outputs(gains))
        if not x.is_floating_point():  # ids of an embedding
            return super().forward(x, layer)
        return layer(scaled(x, layer.site.inputs(gains)))
