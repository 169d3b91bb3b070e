"""IA3 (arXiv 2205.05638): y = l * (W x + b), or W (l * x) + b in feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftType, TargetConfig, pattern_matches
from ..engine.adapter import Adapter
from ..engine.host import Beneath
from ..engine.site import Site
from . import defaults


@dataclass
class IA3Config(TargetConfig):
    """Learned gains, of the outputs; of the inputs in ``feedforward_modules``."""

    feedforward_modules: Any = None  # names or a regex, as target_modules; a part of them
    fan_in_fan_out: bool = (
        False  # PEFT's note that weights are stored transposed; the layer's type decides here
    )
    init_ia3_weights: bool = True  # False: random gains

    METHOD = PeftType.IA3
    TARGETS = defaults.IA3
    FEEDFORWARD = defaults.IA3_FEEDFORWARD
    SUBSETS = ("feedforward_modules",)
    BEYOND = TargetConfig.BEYOND | {"layers_to_transform", "layers_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)

    def adapter(self) -> type[Adapter]:
        return IA3

    def means(self, entry: str, path: str) -> bool:
        return (
            pattern_matches(entry, path)
            if isinstance(self.feedforward_modules, str)
            else super().means(entry, path)
        )

    def feeds_forward(self, path: str) -> bool:
        """Whether the layer at ``path`` is scaled at its input."""
        names = self.feedforward_modules or ()
        return any(
            self.means(name, path) for name in ([names] if isinstance(names, str) else names)
        )


class IA3(Adapter):
    """One gain per output channel, or per input channel."""

    keys: ClassVar[dict[str, str]] = {"l": "ia3_l"}

    def __init__(self, config: IA3Config, site: Site) -> None:
        super().__init__(config, site)
        self.feedforward = config.feeds_forward(site.path)
        self.random = not config.init_ia3_weights
        self.register_buffer("index", site.input_channel(), persistent=False)
        self.index: Tensor | None
        channels = site.in_channels if self.feedforward else site.shape[0]
        kernel = len(site.channel_shape()) > 1 + len(site.lead)
        column = (
            (*site.channel_shape()[:1], channels, *site.channel_shape()[2:]) if kernel else None
        )
        flat = (*site.lead, 1, channels) if self.feedforward else (*site.lead, channels, 1)
        self.l = nn.Parameter(torch.empty(column or flat))

    def start(self, site: Site) -> None:
        nn.init.normal_(self.l) if self.random else nn.init.ones_(self.l)

    def gains(self) -> Tensor:
        lead = self.l.ndim == 3 and self.l.shape[0] != 1
        return self.l.flatten(1) if lead else self.l.flatten()  # (..., channels)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.feedforward:
            gains = self.gains()
            return w * (gains[..., None, :] if self.index is None else gains[self.index]), b
        return w * self.gains()[..., None], b if b is None else b * self.gains()

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if not self.feedforward:
            return layer(x) * layer.site.outputs(self.gains())
        return (
            layer(x * layer.site.inputs(self.gains()))
            if x.is_floating_point()
            else super().forward(x, layer)
        )
