"""AdaLoRA (arXiv 2303.10512): W + s P diag(e) Q, s = alpha / r, with P and Q near orthogonal. The
least important triplets (P_i, e_i, Q_i) of the model are masked while training goes from init_r to
target_r.
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

    rank_pattern: Any = None  # {path + ".lora_E": which triplets are kept}, written by training
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
    mask: ClassVar[Any] = None  # the kept triplets at one path, set by `at`

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.init_r, "init_r")
        check_rank(self.target_r, "target_r")
        check_rank(self.total_step, "total_step")  # of the whole training
        if self.tinit >= self.end:
            raise ValueError(
                f"tinit and tfinal leave none of total_step={self.total_step} steps for pruning"
            )
        if self.use_dora or self.lora_bias or self.use_rslora or self.alpha_pattern:
            raise ValueError(
                "AdaLoRA has no use_dora, lora_bias, use_rslora or alpha_pattern; leave them out"
            )

    @property
    def end(self) -> int:
        """The step at which the budget has reached target_r."""
        return (self.total_step or 0) - self.tfinal

    def adapter(self) -> type[Adapter]:
        return AdaLoRA

    def at(self, path: str, parameter: str = "weight") -> AdaLoraConfig:
        new = copy(self)
        new.mask = (self.rank_pattern or {}).get(f"{path}.lora_E")  # type: ignore[misc]
        return new

    def budget(self, step: int, sites: int) -> int:
        """How many triplets the model may keep after ``step`` optimizer steps (1-based)."""
        left = min(1.0, max(0.0, 1 - (step - self.tinit) / (self.end - self.tinit)))
        return int(sites * (self.init_r - self.target_r) * left**3 + sites * self.target_r)

    def penalty(self, adapters: Mapping[str, Any]) -> Tensor:
        """orth_reg_weight times the mean of ||Q Q' - I|| and ||P' P - I||."""
        grams = [g for a in adapters.values() for g in (a.A @ a.A.mT, a.B.mT @ a.B)]
        norms = [(g - torch.eye(g.shape[-1]).to(g)).norm() for g in grams]
        return self.orth_reg_weight * torch.stack(norms).mean()

    @torch.no_grad()
    def after_step(self, adapters: Mapping[str, Any], step: int) -> None:
        """Mask the least important triplets, as the schedule says."""
        for a in adapters.values() if step < self.end or step == 1 else ():
            a.observe(self.beta1, self.beta2)
        if self.tinit < step <= self.end and (step % self.deltaT == 0 or step == self.end):
            every = torch.cat([a.importance().flatten() for a in adapters.values()])
            drop = len(every) - self.budget(step, len(every) // self.init_r)
            bar = every.kthvalue(drop).values if drop > 0 else -torch.inf
            for a in adapters.values():
                a.kept = a.importance() > bar
            flat = {path: a.kept.tolist() for path, a in adapters.items() if a.kept.ndim == 1}
            self.rank_pattern = {f"{path}.lora_E": kept for path, kept in flat.items()}
        if step >= self.end or step % self.deltaT == 0:
            for a in adapters.values():
                a.E.masked_fill_(~a.kept[..., None], 0.0)


class AdaLoRA(LowRank):
    """A = Q (r, in), B = P (out, r), E = e (r, 1); E is zero at the start."""

    keys: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    kept: Tensor  # (..., r), which triplets are not masked

    def __init__(self, config: AdaLoraConfig, site: Site) -> None:
        super().__init__(config, site)
        out, in_ = site.shape
        r = config.init_r if config.mask is None else sum(config.mask)
        self.A = nn.Parameter(torch.empty(*site.lead, r, in_))
        self.B = nn.Parameter(torch.empty(*site.lead, out, r))
        self.E = nn.Parameter(torch.empty(*site.lead, r, 1))
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.register_buffer("kept", torch.ones(*site.lead, r, dtype=torch.bool), persistent=False)
        self.seen: dict[str, Tensor] = {}  # smoothed importance and its uncertainty, by tensor

    def start(self, site: Site) -> None:
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        nn.init.zeros_(self.E)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E * self.A, self.scale * self.B

    def rank(self) -> int:
        return int(self.kept.sum()) // self.kept[..., 0].numel() if self.kept.numel() else 0

    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth |p dL/dp| (eq. 9 and 10)."""
        for name, p in self.named_parameters():
            old = {
                key: self.seen.get(f"{name}.{key}", torch.zeros_like(p)) for key in ("ipt", "unc")
            }
            now = (p * p.grad).abs() if p.grad is not None else torch.zeros_like(p)
            self.seen[f"{name}.ipt"] = ipt = beta1 * old["ipt"] + (1 - beta1) * now
            self.seen[f"{name}.unc"] = beta2 * old["unc"] + (1 - beta2) * (now - ipt).abs()

    def importance(self) -> Tensor:
        """One score a triplet, (..., r): eq. 7 and 11."""
        a, b, e = (self.seen[f"{n}.ipt"] * self.seen[f"{n}.unc"] for n in ("A", "B", "E"))
        return e[..., 0] + a.mean(-1) + b.mean(-2)

    def file_tensors(self) -> dict[str, Tensor]:
        if self.kept.ndim > 1 or bool(self.kept.all()):
            return super().file_tensors()
        return {
            "lora_A": self.A[self.kept],
            "lora_B": self.B[:, self.kept],
            "lora_E": self.E[self.kept],
        }

    def expects(self, config: AdaLoraConfig) -> dict[str, tuple[int, ...]]:
        if config.mask is None:
            return super().expects(config)
        r = sum(config.mask)
        return {"lora_A": (r, self.A.shape[1]), "lora_B": (len(self.B), r), "lora_E": (r, 1)}

    def take(self, tensors: Mapping[str, Tensor], config: AdaLoraConfig) -> None:
        if config.mask is None or sum(config.mask) == len(self.E):
            return super().take(tensors, config)
        self.kept.copy_(torch.tensor(config.mask))  # a pruned file, into an adapter of full rank
        self.E.zero_()
        for mine, key in ((self.A, "lora_A"), (self.B.mT, "lora_B"), (self.E, "lora_E")):
            mine[self.kept] = (tensors[key].mT if key == "lora_B" else tensors[key]).to(mine)

    def training_state(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "E": self.E, "kept": self.kept, **self.seen}

    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("A", "B", "E", "kept"):
            getattr(self, name).copy_(tensors[name])
        self.seen = {k: v.to(self.A.device).clone() for k, v in tensors.items() if "." in k}
