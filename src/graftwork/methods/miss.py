"""MiSS (arXiv 2409.15371): W + D' [I I ... I], D (r, out), I (r, r): the input's blocks of r are
summed. "mini": D repeats mini_r columns. "bat": W's r x r tiles T become T + T D + D."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, LowRank, Site
from ..fields import choice, probability, whole


@dataclass
class MissConfig(TargetConfig, method="MISS", peft="exclude bias save layers"):
    """One matrix that all blocks of a layer's input share."""

    r: int = whole(64)  # size of a block
    miss_dropout: float = probability(0.0)  # probability, on the input, in training
    mini_r: int = whole(1)  # in "mini", how many columns of D there are; divides the outputs
    init_weights: Any = choice(True, False, "mini", "bat")  # False: not zero at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights == "bat" and self.miss_dropout and not self.inference_mode:
            raise ValueError("'bat' changes the weight, so it has no miss_dropout; leave that out")

    def adapter(self) -> type[Adapter]:
        return Bat if self.init_weights == "bat" else MiSS


class MiSS(LowRank):
    """D (r, out), or (r, mini_r)."""

    keys = {"D": "miss_block"}
    products_in = (False, True)

    def __init__(self, config: MissConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), mini = site.shape, config.init_weights == "mini"
        columns = config.mini_r if mini else out
        if config.r > in_:
            raise ValueError(f"r={config.r} is more than the {in_} inputs of {where(site)}")
        if out % columns:
            raise ValueError(f"mini_r={columns} does not divide the {out} outputs of {where(site)}")
        self.D = nn.Parameter(torch.empty(config.r, columns))
        self.shape, self.r = site.shape, config.r
        self.zero, self.dropout = config.init_weights, nn.Dropout(config.miss_dropout)

    def start(self, site: Site) -> None:
        self.D.zero_() if self.zero else nn.init.kaiming_uniform_(self.D, a=5**0.5)

    def rank(self) -> int:
        return min(self.D.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        (out, in_), (r, columns) = self.shape, self.D.shape
        blocks = torch.eye(r).to(self.D).repeat(1, -(-in_ // r))
        return blocks[:, :in_], self.D.repeat(1, out // columns).mT

    def branch(self, x: Tensor, site: Site) -> Tensor:
        if not site.pointwise:
            return super().branch(x, site)
        (out, in_), (r, columns) = self.shape, self.D.shape
        blocks = torch.unflatten(F.pad(x, (0, -in_ % r)), -1, (-1, r))
        return blocks.sum(-2) @ self.D.repeat(1, out // columns)


class Bat(Adapter):
    """D (out / r, r, r), one for each row of tiles."""

    keys = {"D": "miss_block"}

    def __init__(self, config: MissConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), r = site.shape, config.r
        if out % r or in_ % r:
            raise ValueError(f"r={r} does not divide the {in_} inputs and {out} of {where(site)}")
        self.D = nn.Parameter(torch.empty(out // r, r, r))

    def start(self, site: Site) -> None:
        self.D.zero_()

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r, d = self.D.shape[-1], self.D[:, None]  # (out / r, 1, r, r)
        tiles = w.reshape(len(d), r, -1, r).transpose(1, 2)
        return (tiles + tiles @ d + d).transpose(1, 2).reshape(w.shape), b


def where(site: Site) -> str:
    """The place, for messages, and what to do."""
    return f"{site.path} {site.describe()}; give another there with overrides"
