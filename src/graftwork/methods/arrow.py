"""Arrow (arXiv 2405.11157): y + sum_e c_e s_e B_e A_e x over the adapters e of a layer, c = softmax
of the k largest |x . p_e| / temperature, p_e the top right singular vector of B_e A_e.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Adapter, Beneath, Site
from ..errors import StateError
from .lora import LoRA
from .lora_config import LoraConfig
from .lora_options import ArrowConfig

ROUNDS = 15  # of the power iteration


class Arrow(Adapter):
    """p (adapters, in); has no tensors that train, and reads those of the other adapters."""

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
        p = torch.zeros(len(self.names), site.shape[1])
        self.p = nn.Buffer(p, persistent=False)

    def derive(self, site: Site) -> None:
        seed, drawn = self.options.rng_seed, None
        for row, (a, b) in zip(self.p, self.experts(site), strict=True):
            if seed is not None:
                drawn = torch.Generator(a.device).manual_seed(seed)
            a, b = a.float(), b.float()
            v = torch.randn(a.shape[1], generator=drawn, device=a.device)
            for _ in range(ROUNDS):
                v = a.mT @ (b.mT @ (b @ (a @ v)))
                v = v / (v.norm() + 1e-8)
            row.copy_(v)

    def experts(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each adapter, less the mean of the general ones."""
        mean_a: Tensor | int = 0
        mean_b: Tensor | int = 0
        if self.options.use_gks and self.options.gks_adapter_names:
            general = [self.lora(site, name) for name in self.options.gks_adapter_names]
            mean_a = torch.stack([one.A for one in general]).mean(0)
            mean_b = torch.stack([one.B for one in general]).mean(0)
        every = [self.lora(site, name) for name in self.names]
        return [(e.A - mean_a, e.scale * (e.B - mean_b)) for e in every]

    def lora(self, site: Site, name: str) -> LoRA:
        """The LoRA of a name at the same layer."""
        found: list[LoRA] = [part for _, part in site.host.parts_of(name) if type(part) is LoRA]  # type: ignore[union-attr]
        if not found:
            raise StateError(f"Arrow goes through {name!r}, which is no plain LoRA at {site.path}")
        return found[0]

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        near = (x @ self.p.mT).abs()  # the sign of a singular vector means nothing
        top, index = near.topk(min(self.options.top_k, len(self.names)), dim=-1)
        c = torch.full_like(near, -torch.inf).scatter(-1, index, top)
        c = (c / self.options.router_temperature).softmax(-1)  # (..., adapters)
        experts = self.experts(layer.site)
        added: Any = sum(c[..., e, None] * (x @ a.mT @ b.mT) for e, (a, b) in enumerate(experts))
        out: Tensor = layer(x) + self.dropout(added)
        return out


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """A model in which Arrow, active as ``arrow_router``, goes through saved LoRAs.

    Args:
        base_model: the model that they were trained for.
        task_specific_adapter_paths: their folders, or repositories with a folder behind: they
            become ``task_0``, ``task_1``, ...
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
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    named = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    arrow_config.task_adapter_names = list(named)
    arrow_config.gks_adapter_names = [f"gks_{i}" for i in range(len(general))]
    named |= dict(zip(arrow_config.gks_adapter_names, general, strict=True))
    model: Any = None
    for name, path in named.items():
        source, options = _source(path)
        options |= adapter_kwargs
        if model is None:
            model = PeftModel.from_pretrained(base_model, source, adapter_name=name, **options)
        else:
            model.load_adapter(source, adapter_name=name, **options)
    paths, r = _alike(model, list(named))
    router = LoraConfig(arrow_config=arrow_config, target_modules=paths, r=r)
    model.add_adapter("arrow_router", router)
    model.set_adapter("arrow_router")
    return model


def _source(path: str) -> tuple[str, dict[str, Any]]:
    """``user/repository/folder`` of the hub -> the repository, and the folder as an option."""
    parts = str(path).strip("/").split("/")
    if Path(path).is_dir() or len(parts) < 3:
        return path, {}
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}


def _alike(model: Any, names: Sequence[str]) -> tuple[list[str], int]:
    """The layers and the rank that the adapters have in common."""
    places = {
        name: {path: part.rank() for path, host in model.base_model.hosts().items()
               for _, part in host.parts_of(name)}
        for name in names
    }  # fmt: skip
    first = places[names[0]]
    for name in names:
        if places[name] != first:
            raise ValueError(
                f"{name!r} sits at other layers than {names[0]!r}, or with other ranks; Arrow "
                "needs adapters of one kind"
            )
    return sorted(first), next(iter(first.values()))
