"""The kinds of layers that a method is tested at, each as a model of one layer with an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Transposed(nn.Module):
    """transformers' ``Conv1D``, GPT-2's linear layer, where transformers is not installed."""

    def __init__(self, out: int, in_: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(in_, out)), nn.Parameter(torch.zeros(out))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales its output, as Gemma's does."""

    embed_scale: Tensor

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
        up, down = (3, 8, 12), (3, 12, 6)
        self.up = nn.Parameter(torch.randn(up if transposed else (3, 12, 8)) / 3)
        self.down = nn.Parameter(torch.randn(down if transposed else (3, 6, 12)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.einsum("bei,eio->bo", torch.einsum("bi,eio->beo", x, up).tanh(), down)


class Told(NamedTuple):
    """What a model gives that is asked for its hidden states, as transformers' models are."""

    hidden_states: tuple[Tensor, ...]
    logits: Tensor


class One(nn.Module):
    """A model of one layer, called ``l``; what the layer gives is its hidden state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.l = layer

    def forward(
        self, x: Tensor, output_hidden_states: bool = False, return_dict: bool = False
    ) -> Any:
        y = self.run(x)
        return Told((y,), y) if output_hidden_states else y

    def run(self, x: Tensor) -> Any:
        layer: Any = getattr(self.l, "base_layer", self.l)
        if not isinstance(layer, nn.MultiheadAttention):
            return self.l(x)
        query, key, value = x[..., :8], x[..., 8:14], x[..., 14:]
        if layer.kdim == 8:
            key = value = query
        return self.l(query, key, value)[0]


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Args:
        layer: builds it.
        x: an input, four rows.
        about: what it is, for tables.
        tags: what is particular: "ids" (its input are ids), "fold" (only the folded weight is
            used), "stacked", "tokens" (it has a vocabulary), "bias" (it has one), "biased" (its
            module has some).
        fields: what a config needs beside its own fields to sit there.
        whole: whether it is no layer but a whole model.
    """

    layer: Callable[[], nn.Module]
    x: Tensor
    about: str
    tags: frozenset[str] = frozenset()
    fields: dict[str, Any] = field(default_factory=lambda: {"target_modules": {"l"}})
    whole: bool = False


def _conv1d() -> nn.Module:
    try:
        from transformers.pytorch_utils import Conv1D
    except ModuleNotFoundError:
        layer: Any = Transposed(6, 8)
    else:
        layer = Conv1D(6, 8)
    nn.init.normal_(layer.bias)
    return layer  # type: ignore[no-any-return]


_g = torch.Generator().manual_seed(0)


def _kind(
    layer: Callable[[], nn.Module],
    shape: tuple[int, ...],
    about: str,
    tags: str = "",
    **fields: Any,
) -> Kind:
    ids = "ids" in tags.split()
    x = torch.randint(0, 12, shape, generator=_g) if ids else torch.randn(*shape, generator=_g)
    own = fields or {"target_modules": {"l"}}
    return Kind(layer, x, about, frozenset(tags.split()), own)


KINDS: dict[str, Kind] = {
    "linear": _kind(lambda: nn.Linear(8, 6), (4, 8), "Linear", "bias biased tokens"),
    "linear_3d": _kind(lambda: nn.Linear(8, 6, bias=False), (4, 3, 8), "Linear", "tokens"),
    "conv1d_gpt2": _kind(_conv1d, (4, 3, 8), "transformers' Conv1D", "bias biased"),
    "conv1d": _kind(
        lambda: nn.Conv1d(8, 6, 3, padding="same"), (4, 8, 9), "Conv1d", "bias biased"
    ),
    "conv2d": _kind(
        lambda: nn.Conv2d(8, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1)),
        (4, 8, 11, 7), "Conv2d", "bias biased",
    ),
    "conv2d_groups": _kind(
        lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1, padding_mode="reflect"),
        (4, 8, 7, 7), "Conv2d, groups", "bias biased",
    ),
    "conv2d_depthwise": _kind(
        lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="replicate", bias=False),
        (4, 8, 7, 7), "Conv2d, depthwise", "depthwise",
    ),
    "conv3d": _kind(
        lambda: nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 1, 0), padding_mode="circular"),
        (4, 4, 5, 6, 3), "Conv3d", "bias biased",
    ),
    "embedding": _kind(lambda: nn.Embedding(12, 6), (4, 5), "Embedding", "ids tokens"),
    "embedding_padding": _kind(
        lambda: nn.Embedding(12, 6, padding_idx=3), (4, 5), "Embedding, padding", "ids tokens"
    ),
    "embedding_max_norm": _kind(
        lambda: nn.Embedding(12, 6, max_norm=1.5), (4, 5), "Embedding, max norm", "ids tokens"
    ),
    "embedding_scaled": _kind(
        lambda: ScaledEmbedding(12, 6), (4, 5), "Embedding, scaled", "ids tokens"
    ),
    "attention": _kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        (4, 5, 8), "MultiheadAttention", "fold biased",
    ),
    "attention_unequal": _kind(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True), (4, 5, 18),
        "MultiheadAttention, unequal", "fold biased",
    ),
    "experts": _kind(
        lambda: Experts(False), (4, 8), "stacked parameters", "fold stacked",
        target_parameters=["l.up", "l.down"], target_modules=set(),
    ),
    "experts_transposed": _kind(
        lambda: Experts(True), (4, 8), "stacked parameters, transposed", "fold stacked",
        target_parameters=["up", "down"], target_modules=set(),
    ),
}  # fmt: skip
