"""AdaLoRA (arXiv 2303.10512): W + s P diag(e) Q, s = alpha / r, P and Q near orthogonal; training
masks the model's least important triplets (P_i, e_i, Q_i), from init_r to target_r."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine import LowRank, Site
from ..fields import whole
from .lora_config import LoraConfig


@dataclass
class AdaLoraConfig(LoraConfig, method="ADALORA"):
    """The schedule, in optimizer steps: tinit at init_r, then down, then tfinal at target_r."""

    rank_pattern: Any = None  # {path + ".lora_E": which triplets are kept}, written by training
    target_r: int = whole(8)  # average rank at the end
    init_r: int = whole(12)  # rank at the start
    tinit: int = 0  # steps before pruning begins
    tfinal: int = 0  # steps after it has ended
    deltaT: int = 1  # noqa: N815 - PEFT's name; steps between two prunings
    beta1: float = 0.85  # smoothing of the importance
    beta2: float = 0.85  # smoothing of its uncertainty
    orth_reg_weight: float = 0.5  # weight of the orthogonality penalty
    total_step: int | None = whole(None)  # optimizer steps of the whole training

    PATTERNS = {}
    mask: ClassVar[Any] = None  # the kept triplets at one path, set by `at`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tinit >= self.end:
            raise ValueError(f"tinit and tfinal leave no step of {self.total_step} for pruning")
        for name in ("use_dora", "lora_bias", "use_rslora", "alpha_pattern"):
            if getattr(self, name):
                raise ValueError(f"AdaLoRA has no {name}; leave it out")

    @property
    def end(self) -> int:  # the step at which the budget has reached target_r
        return (self.total_step or 0) - self.tfinal

    def at(self, path: str, parameter: str = "weight") -> AdaLoraConfig:
        new = replace(super().at(path, parameter))
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


class AdaLoRA(LowRank, config=AdaLoraConfig):
    """A = Q (r, in), B = P (out, r), E = e (r, 1); E is zero at the start."""

    keys = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    stacked = True

    def __init__(self, config: AdaLoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.r = r = config.init_r if config.mask is None else sum(config.mask)
        shapes = (r, site.shape[1]), (site.shape[0], r), (r, 1)
        self.A, self.B, self.E = (nn.Parameter(torch.empty(*site.lead, *n)) for n in shapes)
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.kept = nn.Buffer(torch.ones(*site.lead, r, dtype=torch.bool), persistent=False)

    def start(self, site: Site) -> None:
        for p, std in (self.A, 0.02), (self.B, 0.02), (self.E, 0.0):
            p.normal_(std=std)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E * self.A, self.scaler * self.B

    def rank(self) -> int:
        every = max(1, self.kept.numel())
        return self.r if self.kept.is_meta else int(self.kept.sum()) * self.r // every

    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth |p dL/dp|, the importance, and its uncertainty (eq. 9 and 10)."""
        for name, p in self.named_parameters():
            zero = torch.zeros_like(p)
            old, spread = (self.seen.get(f"{name}.{key}", zero) for key in ("ipt", "unc"))
            now = zero if p.grad is None else (p * p.grad).abs()
            self.seen[f"{name}.ipt"] = ipt = beta1 * old + (1 - beta1) * now
            self.seen[f"{name}.unc"] = beta2 * spread + (1 - beta2) * (now - ipt).abs()

    def importance(self) -> Tensor:
        """One score a triplet, (..., r): eq. 7 and 11."""
        a, b, e = (self.seen[f"{n}.ipt"] * self.seen[f"{n}.unc"] for n in ("A", "B", "E"))
        return e[..., 0] + a.mean(-1) + b.mean(-2)

    def file_tensors(self) -> dict[str, Tensor]:
        if (kept := self.kept).ndim > 1 or bool(kept.all()):
            return super().file_tensors()
        return {"lora_A": self.A[kept], "lora_B": self.B[:, kept], "lora_E": self.E[kept]}

    def expects(self, config: AdaLoraConfig) -> dict[str, tuple[int, ...]]:
        if config.mask is None or len(config.mask) != len(self.E):
            return {self.keys[n]: tuple(p.shape) for n, p in self.named_parameters()}
        r = sum(config.mask)
        return {"lora_A": (r, self.A.shape[1]), "lora_B": (len(self.B), r), "lora_E": (r, 1)}

    def take(self, tensors: Mapping[str, Tensor], config: AdaLoraConfig) -> None:
        if config.mask is None or sum(config.mask) == len(self.E):
            self.kept.fill_(True)
            return super().take(tensors, config)
        kept = self.kept.copy_(torch.tensor(config.mask))  # a pruned file, into one of full rank
        self.E.zero_()
        a, b, e = (tensors[key].to(self.A) for key in ("lora_A", "lora_B", "lora_E"))
        self.A[kept], self.B[:, kept], self.E[kept] = a, b, e
