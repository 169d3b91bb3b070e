"""C3A (arXiv 2407.19342): W + C / in, C of circulant blocks: C[mb + p, nb + q] = k[m, n, q - p]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Additive, Site
from ..fields import choice, whole

STARTS = ("xavier_uniform", "gaussian", "kaiming_uniform")


@dataclass
class C3AConfig(TargetConfig, method="C3A", peft="bias save layers"):
    """Circular convolutions of blocks of the input: full rank from out in / b numbers."""

    block_size: int = whole(256)  # b; must divide a layer's inputs and outputs
    block_size_pattern: Any = field(default_factory=dict)  # {regex for the end of a path: b there}
    init_weights: Any = choice(*STARTS, True, False)  # True: zero; False: "xavier_uniform"

    PATTERNS = {"block_size_pattern": "block_size"}


class C3A(Additive, config=C3AConfig):
    """k (out / b, in / b, b), the first row of each block."""

    keys = {"k": "c3a_kernel"}

    def __init__(self, config: C3AConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), b = site.shape, config.block_size
        if out % b or in_ % b:
            fits = max(n for n in range(1, b + 1) if not (out % n or in_ % n))
            raise ValueError(
                f"block_size={b} does not divide the {in_} inputs and {out} outputs of "
                f"{site.path} {site.describe()}; try {fits}, there alone with block_size_pattern"
            )
        self.k = nn.Parameter(torch.empty(out // b, in_ // b, b))
        self.shape, self.scale, self.start_name = site.shape, 1 / in_, config.init_weights

    def start(self, site: Site) -> None:
        out, in_ = self.shape
        if self.start_name is True:
            self.k.zero_()
        elif self.start_name == "gaussian":
            self.k.normal_()
        else:
            bound = (1 / in_ if self.start_name == "kaiming_uniform" else 6 / (in_ + out)) ** 0.5
            self.k.uniform_(-bound, bound)

    def delta(self) -> Tensor:
        q = torch.arange(self.k.shape[-1], device=self.k.device)
        blocks = self.k[..., (q - q[:, None]) % len(q)]  # (out / b, in / b, p, q)
        return self.scale * blocks.transpose(1, 2).reshape(self.shape)

    def branch(self, x: Tensor, site: Site) -> Tensor:
        if not (site.pointwise and x.is_floating_point()):
            return super().branch(x, site)
        b = self.k.shape[-1]
        x = torch.fft.rfft(torch.unflatten(wide(x), -1, (-1, b)))  # (..., in / b, frequency)
        y = torch.einsum("...nf,mnf->...mf", x, torch.fft.rfft(wide(self.k)).conj())
        update: Tensor = self.scale * torch.fft.irfft(y, n=b).flatten(-2)
        return update


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32 or better: half precision has no Fourier transform."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
