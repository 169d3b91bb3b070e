"""The methods and layers over which the laws are tested. A new method is one more line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, TrainableTokensConfig


def lora(**options: Any) -> Callable[..., LoraConfig]:
    return lambda **where: LoraConfig(**{"r": 2, "lora_alpha": 3, **options, **where})


def ia3_feedforward(**where: Any) -> IA3Config:
    return IA3Config(feedforward_modules=where.get("target_modules"), **where)


# name -> a config for the given target_modules or target_parameters
METHODS: dict[str, Callable[..., Any]] = {
    "lora": lora(),
    "lora_random": lora(init_lora_weights=False),
    "lora_gaussian": lora(init_lora_weights="gaussian"),
    "lora_orthogonal": lora(init_lora_weights="orthogonal"),
    "lora_pissa": lora(init_lora_weights="pissa"),
    "lora_fast_pissa": lora(init_lora_weights="pissa_niter_4"),
    "lora_olora": lora(init_lora_weights="olora"),
    "lora_rs": lora(use_rslora=True),
    "lora_bias": lora(lora_bias=True),
    "lora_trains_bias": lora(bias="lora_only"),
    "dora": lora(use_dora=True),
    "dora_pissa": lora(use_dora=True, init_lora_weights="pissa"),
    "adalora": lambda **where: AdaLoraConfig(init_r=3, target_r=2, total_step=10, **where),
    "ia3": IA3Config,
    "ia3_feedforward": ia3_feedforward,
    "tokens": lambda **where: TrainableTokensConfig(token_indices=[1, 3], **where),
}
NOT_IDENTITY = {"lora_random"}


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales its output, as Gemma's does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class Experts(nn.Module):
    """Stacked expert weights, all of them applied to every row."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 8, 10), (3, 10, 6)
        self.up = nn.Parameter(torch.randn(up if transposed else (3, 10, 8)) / 3)
        self.down = nn.Parameter(torch.randn(down if transposed else (3, 6, 10)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.einsum("bei,eio->bo", torch.einsum("bi,eio->beo", x, up).tanh(), down)


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.l = layer

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(getattr(self.l, "base_layer", self.l), nn.MultiheadAttention):
            return self.l(x)
        query, key, value = x[..., :8], x[..., 8:14], x[..., 14:]
        if self.l.kdim == 8:
            key = value = query
        return self.l(query, key, value)[0]


@dataclass
class Site:
    """A kind of layer, an input for it, and what configs target."""

    layer: Callable[[], nn.Module]
    x: Tensor
    where: dict[str, Any]
    tags: tuple[str, ...] = ()


def _conv1d(*args: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(*args)
    nn.init.normal_(layer.bias)
    return layer


_g = torch.Generator().manual_seed(0)
_here = {"target_modules": ["l"]}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_g)


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 12, shape, generator=_g)


SITES = {
    "linear": Site(lambda: nn.Linear(8, 6), _randn(4, 8), _here, ("bias", "rows", "tokens")),
    "linear_3d": Site(lambda: nn.Linear(8, 6, bias=False), _randn(4, 3, 8), _here, ("tokens",)),
    "conv1d_gpt2": Site(lambda: _conv1d(6, 8), _randn(4, 3, 8), _here, ("bias",)),
    "conv1d": Site(lambda: nn.Conv1d(8, 6, 3, padding="same"), _randn(4, 8, 9), _here, ("bias",)),
    "conv2d": Site(
        lambda: nn.Conv2d(8, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1)),
        _randn(4, 8, 11, 7),
        _here,
        ("bias", "rows"),
    ),
    "conv2d_groups": Site(
        lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1, padding_mode="reflect"),
        _randn(4, 8, 7, 7),
        _here,
        ("bias",),
    ),
    "conv2d_depthwise": Site(
        lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="replicate", bias=False),
        _randn(4, 8, 7, 7),
        _here,
    ),
    "conv3d": Site(
        lambda: nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 1, 0), padding_mode="circular"),
        _randn(4, 4, 5, 6, 3),
        _here,
        ("bias",),
    ),
    "embedding": Site(lambda: nn.Embedding(12, 6), _ids(4, 5), _here, ("rows", "ids", "tokens")),
    "embedding_padding": Site(
        lambda: nn.Embedding(12, 6, padding_idx=3), _ids(4, 5), _here, ("ids", "tokens")
    ),
    "embedding_max_norm": Site(
        lambda: nn.Embedding(12, 6, max_norm=1.5), _ids(4, 5), _here, ("ids", "tokens")
    ),
    "embedding_scaled": Site(lambda: ScaledEmbedding(12, 6), _ids(4, 5), _here, ("ids", "tokens")),
    "attention": Site(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        _randn(4, 5, 8),
        _here,
        ("parameter", "rows"),
    ),
    "attention_unequal": Site(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
        _randn(4, 5, 18),
        _here,
        ("parameter",),
    ),
    "experts": Site(
        lambda: Experts(False), _randn(4, 8), {"target_parameters": ["l.up", "l.down"]},
        ("parameter", "stacked", "rows"),
    ),
    "experts_transposed": Site(
        lambda: Experts(True), _randn(4, 8), {"target_parameters": ["up", "down"]},
        ("parameter", "stacked"),
    ),
}  # fmt: skip


def applies(method: str, site: str) -> bool:
    """Whether a method has a meaning at a kind of layer."""
    tags = SITES[site].tags
    if method == "tokens":
        return "tokens" in tags
    if method == "lora_trains_bias":
        return "bias" in tags
    if "stacked" in tags and method.startswith("ia3"):
        return False  # PEFT's IA3Config names no parameters
    if method == "lora_bias":
        return "ids" not in tags and "parameter" not in tags
    if method == "lora_olora" or "pissa" in method:
        return "depthwise" not in site and "ids" not in tags
    return True


CASES = [(m, s) for m in METHODS for s in SITES if applies(m, s)]


def config(method: str, site: str) -> Any:
    return METHODS[method](**SITES[site].where)


def make(site: str, *methods: str, jiggle: float = 0.1, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one layer with an adapter per method, named a0, a1, ..., all of them active."""
    torch.manual_seed(0)
    model: Any = One(SITES[site].layer()).to(dtype).eval()
    for i, method in enumerate(methods):
        if i == 0:
            model = PeftModel(model, config(method, site), "a0")
        else:
            model.add_adapter(f"a{i}", config(method, site))
    model.set_adapter([f"a{i}" for i in range(len(methods))])
    if jiggle:
        shake(model, jiggle)
    return model


def x_of(site: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = SITES[site].x
    return x.to(dtype) if x.is_floating_point() else x


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.1, seed: int = 1) -> None:
    """Move every trainable number away from the start."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_((torch.randn(p.shape, generator=generator) * size).to(p.dtype))
