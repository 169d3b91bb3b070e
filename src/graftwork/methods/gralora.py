"""GraLoRA (arXiv 2505.20355): W + s D (+ s Bg Ag), D of k x k blocks, each of rank r / k:
D[o, i] = (A[i, o] B[o, i])', A[i, o] (in / k, r / k), B[o, i] (r / k, out / k)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Additive, Site
from ..fields import probability, whole


@dataclass
class GraloraConfig(TargetConfig, method="GRALORA", peft="fan bias save layers"):
    """A low-rank update for each block of the weight: rank up to k r from LoRA's numbers."""

    r: int = whole(32)  # numbers per input and output; each block has rank r / k
    hybrid_r: int = whole(0)  # rank of a LoRA beside it
    alpha: int = 64  # the update is scaled by alpha / (r + hybrid_r)
    gralora_dropout: float = probability(0.0)  # probability, on the input, in training
    gralora_k: int = whole(2)  # k; must divide r and a layer's inputs and outputs
    init_weights: bool = True  # False: the update does not start at zero

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            near = self.gralora_k * max(1, round(self.r / self.gralora_k))
            raise ValueError(f"gralora_k={self.gralora_k} does not divide r={self.r}; try r={near}")


class GraLoRA(Additive, config=GraloraConfig):
    """A (k, in / k, r), B (k, r, out / k), Ag (hybrid_r, in), Bg (out, hybrid_r); A's r columns are
    by output block, B's r rows by input block. B and Bg are zero at the start."""

    keys = {
        "A": "gralora_A", "Ag": "gralora_A_general.weight",
        "B": "gralora_B", "Bg": "gralora_B_general.weight",
    }  # fmt: skip

    def __init__(self, config: GraloraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), r, k, g = site.shape, config.r, config.gralora_k, config.hybrid_r
        if out % k or in_ % k:
            fits = max(n for n in range(1, k + 1) if not (out % n or in_ % n or r % n))
            raise ValueError(
                f"gralora_k={k} does not divide the {in_} inputs and {out} outputs of {site.path} "
                f"{site.describe()}; try {fits}, there alone with overrides"
            )
        self.A, self.B = (
            nn.Parameter(torch.empty(n)) for n in ((k, in_ // k, r), (k, r, out // k))
        )
        self.Ag = nn.Parameter(torch.empty(g, in_)) if g else None
        self.Bg = nn.Parameter(torch.empty(out, g)) if g else None
        self.shape, self.scale, self.zero = site.shape, config.alpha / (r + g), config.init_weights
        self.dropout = nn.Dropout(config.gralora_dropout)

    def start(self, site: Site) -> None:
        for name, p in self.named_parameters():
            bound = 0.0 if self.zero and name[0] == "B" else p.shape[1] ** -0.5
            nn.init.uniform_(p, -bound, bound)  # by the inputs of one block, as in PEFT

    def blocks(self) -> tuple[Tensor, Tensor]:
        """A (k inputs, in / k, k outputs, r / k), B (k outputs, k inputs, r / k, out / k)."""
        k = len(self.A)
        return torch.unflatten(self.A, 2, (k, -1)), torch.unflatten(self.B, 1, (k, -1))

    def delta(self) -> Tensor:
        a, b = self.blocks()
        update = torch.einsum("inos,oism->omin", a, b).reshape(self.shape)
        if self.Ag is not None and self.Bg is not None:
            update = update + self.Bg @ self.Ag
        return self.scale * update

    def branch(self, x: Tensor, site: Site) -> Tensor:
        if not (site.pointwise and x.is_floating_point()):
            return super().branch(x, site)
        a, b = self.blocks()
        h = torch.einsum("...in,inos->...ois", torch.unflatten(x, -1, (len(a), -1)), a)
        y = torch.einsum("...ois,oism->...om", h, b).flatten(-2)
        if self.Ag is not None and self.Bg is not None:
            y = y + site.low_rank(x, self.Ag, self.Bg)
        return self.scale * y
