"""VB-LoRA (arXiv 2405.15179): W + B A, where A and B are cut into short vectors, each a mixture
sum_j softmax(top-k logits)_j v_j of vectors from a bank that all layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, LowRank, Shared, Site
from ..fields import probability, whole


@dataclass
class VBLoRAConfig(TargetConfig, method="VBLORA", peft="exclude fan bias save layers"):
    """Low-rank factors put together from a bank of short vectors."""

    r: int = whole(4)  # rank
    num_vectors: int = whole(256)  # in the bank
    vector_length: int = whole(256)  # of each; the last one's end may be left over
    topk: int = whole(2)  # how many vectors are mixed
    save_only_topk_weights: bool = False  # True: a small file, from which one cannot train on
    vblora_dropout: float = probability(0.0)  # probability, on the input, in training
    init_vector_bank_bound: float = 0.02  # the bank starts between -bound and bound
    init_logits_std: float = 0.1  # of the normal that logits start from; not the base

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} is more than num_vectors={self.num_vectors}")

    def adapter(self) -> type[Adapter]:
        from .vblora_brief import Brief

        return Brief if self.save_only_topk_weights else VBLoRA

    def share(self, sites: Sequence[Site]) -> Shared:
        return Bank(self)


class Bank(Shared):
    """v (vectors, length)."""

    keys = {"v": "vblora_vector_bank"}

    def __init__(self, config: VBLoRAConfig) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(config.num_vectors, config.vector_length))
        self.bound = config.init_vector_bank_bound

    def start(self) -> None:
        self.v.uniform_(-self.bound, self.bound)


class VBLoRA(LowRank):
    """Logits A (..., r, pieces of inputs, vectors) and B (..., pieces of outputs, r, vectors)."""

    keys = {"A": "vblora_logits_A", "B": "vblora_logits_B"}
    stacked = True

    def __init__(self, config: VBLoRAConfig, site: Site, shared: Bank) -> None:
        super().__init__(config, site, shared)
        self.shape, self.r, self.topk = site.shape, config.r, config.topk
        n, (rows, columns) = config.num_vectors, (-(-k // shared.v.shape[1]) for k in site.shape)
        self.A = nn.Parameter(torch.empty(*site.lead, self.r, columns, n))
        self.B = nn.Parameter(torch.empty(*site.lead, rows, self.r, n))
        self.std, self.dropout = config.init_logits_std, nn.Dropout(config.vblora_dropout)

    def start(self, site: Site) -> None:
        for p in self.parameters():
            p.normal_(std=self.std)

    def mixed(self, logits: Tensor) -> Tensor:
        """The vectors (..., length) of logits (..., vectors)."""
        top, index = logits.topk(self.topk, dim=-1)
        chosen: Tensor = self.shared.v[index]  # (..., topk, length)
        return (top.softmax(-1)[..., None] * chosen).sum(-2)

    def factors(self) -> tuple[Tensor, Tensor]:
        out, in_ = self.shape
        a = self.mixed(self.A).flatten(-2)[..., :in_]  # (..., r, in)
        return a, self.mixed(self.B).mT.flatten(-3, -2)[..., :out, :]  # (..., out, r)
