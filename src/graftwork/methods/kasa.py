"""KaSA (arXiv 2412.06071): (W - U_r S_r V_r') + s B diag(d) A, with U_r S_r V_r' the r smallest
singular directions of W; training is told to keep A and B orthogonal and d small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..engine import Site
from ..engine.site import as_factors
from .lora import LoRA, fixed_rank
from .lora_config import LoraConfig


class KaSA(LoRA):
    """LoRA with singular values d (r,) of its own, beside a weight that has lost r directions.

    The base weight is never touched: the directions are taken away beside it, so that without
    the adapter the layer is the base layer (in PEFT it stays changed).
    """

    stacked = False
    pad = fixed_rank

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        if self.r >= min(site.shape):
            raise ValueError(
                f"r={self.r} leaves nothing of the {min(site.shape)} singular directions of "
                f"{site.path} {site.describe()}; use r<{min(site.shape)} there (rank_pattern)"
            )
        self.keys = {**self.keys, "d": "lora_diag"}
        self.d = nn.Parameter(torch.empty(self.r))
        self.lost_a = nn.Buffer(torch.zeros(self.r, site.shape[1]), persistent=False)
        self.lost_b = nn.Buffer(torch.zeros(site.shape[0], self.r), persistent=False)

    def start(self, site: Site) -> None:
        super().start(site)
        if self.A0 is not None:
            raise ValueError(
                f"init_lora_weights={self.start_name!r} changes the weight from which kasa_config "
                "takes directions; use True, 'gaussian' or 'orthogonal'"
            )
        self.d.normal_()

    def derive(self, site: Site) -> None:
        super().derive(site)
        w = site.weight.to(torch.promote_types(site.weight.dtype, torch.float32))
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        self.lost_a.copy_(vh[-self.r :])
        self.lost_b.copy_(u[:, -self.r :] * s[-self.r :])

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = as_factors(self.A, self.B, ())
        a = torch.cat([self.d[:, None] * a, self.lost_a])
        return a, torch.cat([self.scaler * b, -self.lost_b], dim=1)

    @staticmethod
    def penalty(adapters: Sequence[KaSA], config: LoraConfig) -> Tensor:
        """beta sum d^2 + gamma (||B'B - I|| + ||A A' - I||): eq. 9 to 11."""
        terms = []
        for one in adapters:
            a, b = as_factors(one.A, one.B, ())
            eye = torch.eye(one.r, device=a.device, dtype=a.dtype)
            skew = (b.mT @ b - eye).norm() + (a @ a.mT - eye).norm()
            options = config.kasa_config
            terms.append(options.beta * one.d.square().sum() + options.gamma * skew)
        return torch.stack(terms).sum()
