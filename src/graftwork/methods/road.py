"""RoAd (arXiv 2409.00119): y' = R y, W' = R W, b' = R b; R turns and scales pairs of outputs,
y1' = c1 y1 - s1 y2 and y2' = c2 y2 + s2 y1, with c = alpha cos theta and s = alpha sin theta."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Site
from ..fields import choice

# variant -> how many angles a pair has of its own: for cosine and sine, for each of the two outputs
VARIANTS = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}


@dataclass
class RoadConfig(TargetConfig, method="ROAD", peft="save"):
    """Rotations of pairs of outputs."""

    variant: str = choice(*VARIANTS)  # one angle and scale a pair; or two, four of each
    group_size: int = 64  # an output is paired with the one half a group further on
    init_weights: bool = True  # False: not the identity at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"group_size={self.group_size} must be even; try group_size=64")


class RoAd(Adapter, config=RoadConfig):
    """theta and alpha, (out / 2,), (out,) or (2 out,): 0 and 1 at the start."""

    keys = {"theta": "road_theta", "alpha": "road_alpha"}

    def __init__(self, config: RoadConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        alike = _outputs_of_the_same_inputs(site)
        if alike % config.group_size:
            fits = [n for n in range(2, alike + 1, 2) if alike % n == 0]
            near = min(fits, key=lambda n: abs(n - config.group_size), default=None)
            raise ValueError(
                f"group_size={config.group_size} does not divide the {alike} outputs that can be "
                f"paired at {site.path} {site.describe()}; "
                + (f"try {near}" if near else "leave this layer out")
            )
        self.per, self.side = VARIANTS[config.variant], config.group_size // 2
        size = site.shape[0] // 2 * self.per[0] * self.per[1]
        self.theta, self.alpha = (nn.Parameter(torch.empty(size)) for _ in range(2))
        self.random = not config.init_weights

    def start(self, site: Site) -> None:
        nn.init.normal_(self.theta, 0.0, 0.5) if self.random else nn.init.zeros_(self.theta)
        nn.init.normal_(self.alpha, 1.0, 0.5) if self.random else nn.init.ones_(self.alpha)

    def each(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers for cosines and for sines, (groups, 2, side) each."""
        both = v.reshape(-1, *self.per, self.side).expand(-1, 2, 2, self.side)
        return both[:, 0], both[:, 1]

    def turn(self, y: Tensor, axis: int) -> Tensor:
        """R y along an axis, counted from the end."""
        (cos, sin), (a, b) = self.each(self.theta), self.each(self.alpha)
        c, s = ((a * cos.cos()).flatten(), (b * sin.sin()).flatten())
        first, second = torch.unflatten(y, axis, (-1, 2, self.side)).unbind(axis - 1)
        across = torch.stack([-second, first], dim=axis - 1).flatten(axis - 2, axis)
        behind = (1,) * (-1 - axis)
        return y * c.reshape(-1, *behind) + across * s.reshape(-1, *behind)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(w, -2), b if b is None else self.turn(b, -1)

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        return self.turn(layer(x), -1 - len(layer.site.ones))


def _outputs_of_the_same_inputs(site: Site) -> int:
    """All outputs, but at a grouped convolution those of one group."""
    index = site.input_channel()
    return (
        site.shape[0] if index is None or len(index) == 1 else int((index == index[0]).all(1).sum())
    )
