"""AdaLoRA (arXiv 2303.10512): W + s P diag(e) Q, s = alpha / r, with P and Q near orthogonal; the
least important triplets (P_i, e_i, Q_i) of the whole model are masked while training shrinks their
number from init_r to target_r.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftType, check_rank
from ..engine.adapter import Adapter, LowRank
from ..engine.site import Site
from . import defaults
from .lora import LoraConfig


@dataclass
class AdaLoraConfig(LoraConfig):
    """The schedule, in optimizer steps: tinit at init_r, then down, then tfinal at target_r."""

    rank_pattern: Any = None  # {path + ".lora_E": which triplets are kept}: written by training
    target_r: int = 8  # average rank at the end
    init_r: int = 12  # rank at the start
    tinit: int = 0  # steps before pruning begins
    tfinal: int = 0  # steps after it has ended
    deltaT: int = 1  # noqa: N815 - PEFT's name; steps between two prunings
    beta1: float = 0.85  # smoothing of the importance
    beta2: float = 0.85  # smoothing of its uncertainty
    orth_reg_weight: float = 0.5  # weight of the orthogonality penalty
    total_step: int | None = None  # optimizer steps of the whole training

    METHOD = PeftType.ADALORA
    PATTERNS: ClassVar[dict[str, str]] = {}
    TARGETS = defaults.ADALORA
    mask: ClassVar[tuple[bool, ...] | None] = None  # the kept triplets at one path, set by `at`

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.init_r, "init_r"), check_rank(self.target_r, "target_r")
        if not isinstance(self.total_step, int) or self.total_step <= 0:
            raise ValueError(
                "AdaLoraConfig needs total_step, the number of optimizer steps of the whole "
                "training"
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of "
                f"total_step={self.total_step} steps"
            )
        if self.use_dora or self.lora_bias or self.use_rslora or self.alpha_pattern:
            raise ValueError(
                "AdaLoRA has no use_dora, lora_bias, use_rslora or alpha_pattern; leave them out"
            )

    def adapter(self) -> type[Adapter]:
        return AdaLoRA

    def at(self, path: str, parameter: str = "weight") -> AdaLoraConfig:
        new = copy(self)
        kept = (self.rank_pattern or {}).get(f"{path}.lora_E")
        new.mask = None if kept is None else tuple(kept)  # type: ignore[misc]
        return new

    def budget(self, step: int, sites: int) -> int:
        """How many triplets the model may keep after ``step`` optimizer steps (1-based)."""
        first, last, end = (
            self.init_r * sites,
            self.target_r * sites,
            (self.total_step or 0) - self.tfinal,
        )
        if step <= self.tinit:
            return first
        left = max(0.0, 1 - (step - self.tinit) / (end - self.tinit))
        return int((first - last) * left**3 + last)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        """orth_reg_weight times the mean of ||Q Q' - I|| and ||P' P - I||."""
        grams = [g for a in adapters.values() for g in (a.A @ a.A.mT, a.B.mT @ a.B)]
        return (
            self.orth_reg_weight
            * sum((g - torch.eye(g.shape[-1]).to(g)).norm() for g in grams)
            / len(grams)
        )  # type: ignore[return-value]

    @torch.no_grad()
    def after_step(self, adapters: Mapping[str, Any], step: int) -> None:
        """Mask the least important triplets, as the schedule says."""
        end = (self.total_step or 0) - self.tfinal
        if step < end:
            for a in adapters.values():
                a.observe(self.beta1, self.beta2)
        if self.tinit < step <= end and (step % self.deltaT == 0 or step == end):
            scores = {path: a.importance() for path, a in adapters.items()}
            everything = torch.cat([s.flatten() for s in scores.values()])
            drop = len(everything) - self.budget(step, len(everything) // self.init_r)
            bar = (
                everything.kthvalue(drop).values if drop > 0 else everything.new_tensor(-torch.inf)
            )
            for path, a in adapters.items():
                a.kept = scores[path] > bar
            self.rank_pattern = {
                f"{path}.lora_E": a.kept.flatten().tolist() for path, a in adapters.items()
            }
            for a in adapters.values():
                a.E.masked_fill_(~a.kept[..., None], 0.0)
        elif step > end:
            for a in adapters.values():
                a.E.masked_fill_(~a.kept[..., None], 0.0)


class AdaLoRA(LowRank):
    """A = Q (r, in), B = P (out, r), E = e (r, 1); E is zero at the start."""

    keys: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}

    def __init__(self, config: AdaLoraConfig, site: Site) -> None:
        super().__init__(config, site)
        (out, in_), lead, r = (
            site.shape,
            site.lead,
            config.init_r if config.mask is None else sum(config.mask),
        )
        self.A, self.B = (
            nn.Parameter(torch.empty(*lead, r, in_)),
            nn.Parameter(torch.empty(*lead, out, r)),
        )
        self.E = nn.Parameter(torch.empty(*lead, r, 1))
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.register_buffer("kept", torch.ones(*lead, r, dtype=torch.bool), persistent=False)
        self.kept: Tensor
        self.seen: dict[str, Tensor] = {}  # smoothed importance and its uncertainty, of each tensor

    def start(self, site: Site) -> None:
        nn.init.normal_(self.A, std=0.02), nn.init.normal_(self.B, std=0.02), nn.init.zeros_(self.E)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E * self.A, self.scale * self.B

    def rank(self) -> int:
        return int(self.kept.sum()) // max(1, self.kept[..., 0].numel())

    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth |p dL/dp| (eq. 9 and 10)."""
        for name in ("A", "B", "E"):
            p = getattr(self, name)
            now = (p * p.grad).abs()
            old, unsure = (
                self.seen.get(f"{name}.ipt", torch.zeros_like(p)),
                self.seen.get(f"{name}.unc", torch.zeros_like(p)),
            )
            self.seen[f"{name}.ipt"] = ipt = beta1 * old + (1 - beta1) * now
            self.seen[f"{name}.unc"] = beta2 * unsure + (1 - beta2) * (now - ipt).abs()

    def importance(self) -> Tensor:
        """One score a triplet (..., r): eq. 7 and 11."""
        a, b, e = (self.seen[f"{n}.ipt"] * self.seen[f"{n}.unc"] for n in ("A", "B", "E"))
        return e[..., 0] + a.mean(-1) + b.mean(-2)

    def file_tensors(self) -> dict[str, Tensor]:
        tensors, kept = super().file_tensors(), self.kept
        if bool(kept.all()) or kept.ndim > 1:
            return tensors
        return {"lora_A": self.A[kept], "lora_B": self.B[:, kept], "lora_E": self.E[kept]}

    def expects(self, config: Any) -> dict[str, tuple[int, ...]]:
        shapes = super().expects(config)
        if config.mask is None or self.A.ndim > 2:
            return shapes
        r, (_, in_), (out, _) = sum(config.mask), self.A.shape, self.B.shape
        return {"lora_A": (r, in_), "lora_B": (out, r), "lora_E": (r, 1)}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        if config.mask is None or sum(config.mask) == len(self.E) or self.A.ndim > 2:
            return super().take(tensors, config)
        self.kept.copy_(torch.tensor(config.mask))  # a pruned file, into an adapter of full rank
        self.E.zero_()
        self.A[self.kept], self.B[:, self.kept] = (
            tensors[k].to(self.A) for k in ("lora_A", "lora_B")
        )
        self.E[self.kept] = tensors["lora_E"].to(self.E)

    def training_state(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "E": self.E, "kept": self.kept, **self.seen}

    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("A", "B", "E", "kept"):
            getattr(self, name).copy_(tensors[name])
        self.seen = {k: v.to(self.A.device).clone() for k, v in tensors.items() if "." in k}
