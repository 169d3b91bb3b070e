"""Arrow (arXiv 2405.11157): y + sum_e c_e s_e B_e A_e x over the adapters e of a layer, c = softmax
of the k largest |x . p_e| / temperature, p_e the top right singular vector of B_e A_e.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Adapter, Beneath, Site
from ..errors import StateError
from ..files import hub
from .lora import LoRA
from .lora_config import LoraConfig
from .lora_options import ArrowConfig


class Arrow(Adapter):
    """p (adapters, in); has no tensors that train, and reads those of the other adapters."""

    reads = True
    FORBIDS = {"merge": "every token goes through adapters of its own"}

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.options: ArrowConfig = config.arrow_config
        if not site.pointwise:
            raise ValueError(
                f"Arrow routes single positions, and {site.path} {site.describe()} mixes them; use "
                "adapters of linear layers only"
            )
        self.names = tuple(self.options.task_adapter_names or ())
        if not self.names:
            raise ValueError("arrow_config names no adapters; use create_arrow_model")
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.p = nn.Buffer(torch.zeros(len(self.names), site.shape[1]), persistent=False)

    def derive(self, site: Site) -> None:
        seed = self.options.rng_seed
        for row, (a, b) in zip(self.p, self.experts(site), strict=True):
            drawn = None if seed is None else torch.Generator(a.device).manual_seed(seed)
            a, b = a.float(), b.float()
            v = torch.randn(a.shape[1], generator=drawn, device=a.device)
            for _ in range(15):  # the power iteration
                v = a.mT @ (b.mT @ (b @ (a @ v)))
                v = v / (v.norm() + 1e-8)
            row.copy_(v)

    def experts(self, site: Any) -> list[tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each adapter, less the mean of the general ones."""
        general = (self.options.gks_adapter_names or ()) if self.options.use_gks else ()
        every, parts_of = (*self.names, *general), site.host.parts_of
        found = {n: part for n in every for _, part in parts_of(n) if type(part) is LoRA}
        if lost := next((n for n in every if n not in found), None):
            raise StateError(f"Arrow goes through {lost!r}, which is no plain LoRA at {site.path}")
        if not general:
            return [found[name].factors() for name in self.names]
        if taken := next((n for n in every if found[n].A0 is not None), None):
            raise StateError(f"use_gks subtracts plain LoRAs, and {taken!r} has a start taken away")
        a: Any = torch.stack([found[name].A for name in general]).mean(0)
        b: Any = torch.stack([found[name].B for name in general]).mean(0)
        return [(e.A - a, e.scale * (e.B - b)) for e in (found[name] for name in self.names)]

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        near = (x @ self.p.mT).abs()  # the sign of a singular vector means nothing
        top, index = near.topk(min(self.options.top_k, len(self.names)), dim=-1)
        c = torch.full_like(near, -torch.inf).scatter(-1, index, top)
        c = (c / self.options.router_temperature).softmax(-1)  # (..., adapters)
        every = enumerate(self.experts(layer.site))
        added = sum(c[..., e, None] * (x @ a.mT @ b.mT) for e, (a, b) in every)
        return layer(x) + self.dropout(added)  # type: ignore[no-any-return]


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """A model in which Arrow, active as ``arrow_router``, goes through saved LoRAs: ``task_0``, ...

    Args:
        base_model: the model that they were trained for.
        task_specific_adapter_paths: their folders, or repositories with a folder behind.
        arrow_config: the router's options.
        general_adapter_paths: with ``use_gks``, the LoRAs whose mean is taken away: ``gks_0``, ...
        **adapter_kwargs: options of loading.

    Raises:
        ValueError: nothing to go through, or the LoRAs differ in layers or ranks.
    """
    from ..model.peft_model import PeftModel

    if not task_specific_adapter_paths:
        raise ValueError("Arrow needs at least one saved LoRA in task_specific_adapter_paths")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks=True takes general adapters away; give general_adapter_paths")
    tasks = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = general_adapter_paths if arrow_config.use_gks else None
    means = {f"gks_{i}": path for i, path in enumerate(general or ())}
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(tasks), list(means)
    named = {name: hub.place(path) | adapter_kwargs for name, path in (tasks | means).items()}
    first, *others = named
    model: Any = PeftModel.from_pretrained(base_model, adapter_name=first, **named[first])
    for name in others:
        model.load_adapter(adapter_name=name, **named[name])
    hosts = model.base_model.hosts().items()
    ranks = {n: {path: p.rank() for path, h in hosts for _, p in h.parts_of(n)} for n in named}
    if odd := [name for name in others if ranks[name] != ranks[first]]:
        raise ValueError(
            f"{odd[0]!r} sits at other layers than {first!r}, or with other ranks; Arrow needs "
            "adapters of one kind"
        )
    paths, r = sorted(ranks[first]), next(iter(ranks[first].values()))
    router = LoraConfig(arrow_config=arrow_config, target_modules=paths, r=r)
    model.add_adapter("arrow_router", router)
    model.set_adapter("arrow_router")
    return model
