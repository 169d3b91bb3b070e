"""BD-LoRA (arXiv 2510.23346): W + s B A, where A or B consists of n blocks along the diagonal, so
that a layer that is split over n devices needs no exchange between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine import Embedding, Site
from .lora import LoRA, fixed_rank
from .lora_config import LoraConfig


class BDLoRA(LoRA):
    """A (r, in / n) or B (out, r / n): the blocks, one below the other."""

    stacked = False
    pad = fixed_rank

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        options, (out, in_) = config.use_bdlora, site.shape
        self.n = n = options.nblocks
        means = {"A": options.target_modules_bd_a, "B": options.target_modules_bd_b}
        self.blocks = [f for f in means if any(part in site.path for part in means[f] or ())]
        if len(self.blocks) > 1 or (options.match_strict and not self.blocks):
            raise ValueError(
                f"{site.path} is meant by {'both' if self.blocks else 'neither'} of "
                "target_modules_bd_a and target_modules_bd_b, and must be by one of them"
                + ("" if self.blocks else "; match_strict=False makes it a plain LoRA")
            )
        if self.blocks and (self.r % n or (in_ if "A" in self.blocks else out) % n):
            raise ValueError(
                f"nblocks={n} does not divide r={self.r} and "
                f"{'inputs' if 'A' in self.blocks else 'outputs'} of {site.path} {site.describe()}"
            )
        if self.blocks and config.lora_bias:
            raise ValueError(f"{site.path} has blocks, so lora_bias must be False")
        if "A" in self.blocks:
            self.A = nn.Parameter(torch.empty(self.r, in_ // n))
        if "B" in self.blocks:
            self.B = nn.Parameter(torch.empty(out, self.r // n))

    def start(self, site: Site) -> None:
        super().start(site)
        if "A" in self.blocks and not isinstance(site, Embedding):
            nn.init.kaiming_uniform_(self.A)  # whatever init_lora_weights says, as in PEFT
        if "B" in self.blocks and not isinstance(site, Embedding):
            self.B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.A.flatten(1), self.B.flatten(1)
        a = diagonal(a, self.n) if "A" in self.blocks else a
        b = diagonal(b, self.n) if "B" in self.blocks else b
        return a, self.scaler * b


def diagonal(blocks: Tensor, n: int) -> Tensor:
    """n blocks, one below the other, -> the matrix with these blocks along its diagonal."""
    whole: Tensor = torch.block_diag(*blocks.chunk(n))  # type: ignore[no-untyped-call]
    return whole
