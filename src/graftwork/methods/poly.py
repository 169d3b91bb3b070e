"""Poly (arXiv 2202.13914, 2211.03831): W + A_t B_t / r for a row of task t, with factors mixed from
skills: A_t = sum_s z_ts A_s; in splits of inputs and outputs, each with a mixture of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from ..config import TargetConfig
from ..engine import Adapter, Beneath, Site
from ..errors import StateError
from ..fields import choice, whole


@dataclass
class PolyConfig(TargetConfig, method="POLY", peft="exclude save"):
    """A mixture of skills for each task: call the model with ``task_ids=``, one for each row."""

    r: int = whole(8)  # rank of a skill
    init_weights: bool = True  # False: the update does not start at zero
    poly_type: str = choice("poly")  # PEFT's only one
    n_tasks: int = whole(1)  # tasks, each with a mixture
    n_skills: int = whole(4)  # skills that are mixed
    n_splits: int = whole(1)  # parts of inputs and outputs with mixtures of their own

    CONTEXT = ("task_ids",)


class Poly(Adapter, config=PolyConfig):
    """A (splits, skills, in / splits, r), B (splits, skills, r, out / splits), logits z (tasks,
    splits x skills).
    """

    keys = {
        "A": "poly_lora_A", "B": "poly_lora_B", "z": "poly_router.module_logits",
    }  # fmt: skip

    def __init__(self, config: PolyConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        out, in_ = site.shape
        q, s, self.r, self.tasks = config.n_splits, config.n_skills, config.r, config.n_tasks
        if out % q or in_ % q:
            raise ValueError(f"n_splits={q} does not divide {site.path} {site.describe()}")
        self.A = nn.Parameter(torch.empty(q, s, in_ // q, self.r))
        self.B = nn.Parameter(torch.empty(q, s, self.r, out // q))
        self.z, self.zero = nn.Parameter(torch.empty(self.tasks, q * s)), config.init_weights
        if self.tasks > 1:
            self.FORBIDS = {"merge": "its update differs from row to row, by their tasks"}

    def start(self, site: Site) -> None:
        self.A.uniform_(-1, 1).mul_(self.A.shape[2] ** -0.5)
        self.B.uniform_(-1, 1).mul_(self.B.shape[3] ** -0.5 * (not self.zero))
        self.z.uniform_(-1e-3, 1e-3)

    def factors(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """A (rows, r, in) and B (rows, out, r) for rows of these tasks."""
        z = self.z[tasks].reshape(len(tasks), *self.A.shape[:2])  # (rows, splits, skills)
        z = RelaxedBernoulli(z.new_ones(()), logits=z).rsample() if self.training else z.sigmoid()
        z = z / (z.sum(-1, keepdim=True) + 1e-12)
        a = torch.einsum("nqs,qsdr->nrqd", z, self.A).flatten(2)
        b = torch.einsum("nqs,qsrd->nqdr", z, self.B).flatten(1, 2)
        return a, b / self.r

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        first = torch.zeros(1, dtype=torch.long, device=w.device)
        (a,), (c,) = self.factors(first)
        return w + c @ a, b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        tasks = self.tasks_of(x, layer)
        a, b = self.factors(tasks)
        if layer.site.pointwise and x.is_floating_point():
            h = x.flatten(1, -2) if x.ndim > 2 else x[:, None]  # (rows, positions, in)
            return layer(x) + (h @ a.mT @ b.mT).reshape(*x.shape[:-1], -1)
        rows = [layer.site.low_rank(x[i : i + 1], a[i], b[i]) for i in range(len(x))]
        return layer(x) + torch.cat(rows)

    def tasks_of(self, x: Tensor, layer: Beneath) -> Tensor:
        """The task of each row; there may be but one."""
        if self.tasks == 1:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        tasks: Tensor = layer.rows("task_ids", len(x)).to(x.device)
        if not torch.compiler.is_compiling() and int(tasks.max()) >= self.tasks:
            raise StateError(f"task_ids holds {int(tasks.max())}; there are {self.tasks} tasks")
        return tasks

    def delta_norm(self, w: Tensor) -> float:
        a, b = self.factors(torch.arange(self.tasks, device=w.device))
        return float((b @ a).square().sum((1, 2)).mean().sqrt())
