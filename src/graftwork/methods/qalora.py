"""QALoRA (arXiv 2309.14717): W + s B A P, where P (in / g, in) means g neighbouring inputs, times
in / g: an update that is constant within the groups of a quantised weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine import Site
from .lora import LoRA, fixed_rank
from .lora_config import LoraConfig


class QALoRA(LoRA):
    """A (r, in / g), B (out, r)."""

    stacked = False
    pad = fixed_rank

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.group, in_ = config.qalora_group_size, site.shape[1]
        if in_ % self.group or config.lora_bias:
            raise ValueError(
                "QALoRA has no lora_bias; leave it out" if config.lora_bias else
                f"qalora_group_size={self.group} does not divide the {in_} inputs of {site.path} "
                f"{site.describe()}; try {divisor(in_, self.group)}"
            )  # fmt: skip
        self.A = nn.Parameter(torch.empty(self.r, in_ // self.group))

    def factors(self) -> tuple[Tensor, Tensor]:
        pooled = self.A.shape[1]
        a = self.A.repeat_interleave(self.group, dim=1) * (pooled / self.group)
        return a, self.scaler * self.B.flatten(1)


def divisor(n: int, near: int) -> int:
    """The largest divisor of ``n`` that is at most ``near``."""
    return next(k for k in range(min(n, near), 0, -1) if n % k == 0)
