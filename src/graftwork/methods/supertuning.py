"""Super-Tuning (arXiv 2607.09287): W + S, S zero but for the entries where |W| is largest, which
train; with r, Supra: W + S + s B A, s = alpha / r."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Beneath, Site
from ..fields import probability, whole
from .sparse import Sparse


@dataclass
class SupertuningConfig(TargetConfig, method="SUPERTUNING", peft="save"):
    """The largest entries of the weight train, and a LoRA beside them where r is given."""

    sparsity: float = probability(0.99)  # the part of the entries that does not train
    select_top: bool = True  # False: the smallest entries train
    r: int | None = whole(None)  # rank of the LoRA
    lora_alpha: float | None = None  # it is scaled by lora_alpha / r; None: 2 r
    lora_dropout: float = probability(0.0)  # probability, on its input, in training
    init_weights: bool = True  # False: not zero at the start
    save_precomputed_indices: bool = True  # False: a reader finds them in the base weight again

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_dropout and not self.r and not self.inference_mode:
            raise ValueError("lora_dropout is that of the low-rank part, which needs r; give both")
        if self.r is not None:
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        elif self.lora_alpha is not None:
            raise ValueError("lora_alpha scales a LoRA, which there is only with r; give r=8")


class Supertuning(Sparse, config=SupertuningConfig):
    """v (n,); A (r, in) and B (out, r) where there is a LoRA."""

    keys = {
        "v": "supertuning_values", "at": "supertuning_indices",
        "A": "supertuning_lora_A.weight", "B": "supertuning_lora_B.weight",
    }  # fmt: skip

    def __init__(self, config: SupertuningConfig, site: Site, shared: None = None) -> None:
        (out, in_), r = site.shape, config.r or 0
        if (n := int(out * in_ * (1 - config.sparsity))) < 1:
            raise ValueError(
                f"sparsity={config.sparsity} leaves none of the {out * in_} entries of {site.path} "
                f"{site.describe()} to train; "
                f"try {max(0, math.floor(100 - 200 / (out * in_)) / 100)}"
            )
        super().__init__(config, site, n, "sparsity")
        self.saved, self.top = config.save_precomputed_indices, config.select_top
        self.at = nn.Buffer(torch.zeros(n, dtype=torch.int32), persistent=self.saved)
        self.A = nn.Parameter(torch.empty(r, in_)) if r else None
        self.B = nn.Parameter(torch.empty(out, r)) if r else None
        self.scale = (config.lora_alpha or 0) / r if r else 1.0
        self.dropout, self.zero = nn.Dropout(config.lora_dropout), config.init_weights

    def derive(self, site: Site) -> None:
        if not self.saved:
            self.choose(site)

    def start(self, site: Site) -> None:
        if self.saved:
            self.choose(site)
        self.v.zero_() if self.zero else self.v.normal_()
        if self.A is not None and self.B is not None:
            nn.init.kaiming_uniform_(self.A, a=5**0.5)
            self.B.zero_() if self.zero else nn.init.kaiming_uniform_(self.B, a=5**0.5)

    def choose(self, site: Site) -> None:
        """The entries of W with the largest magnitudes, or the smallest."""
        self.at.copy_(site.weight.abs().flatten().topk(len(self.v), largest=self.top).indices)

    def delta(self) -> Tensor:
        if self.A is None or self.B is None:
            return self.dense()
        return self.dense() + self.scale * self.B @ self.A

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        y = layer(x) + layer.site.apply(x, self.dense())
        if self.A is None or self.B is None:
            return y
        return y + layer.site.low_rank(self.dropped(x), self.A, self.scale * self.B)
