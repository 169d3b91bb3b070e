"""Parts that any adapter may bring along: saved modules, trained biases, ends of tied weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .site import Site, Standing, kind_of

if TYPE_CHECKING:
    from .host import Beneath


class Copy(Adapter):
    """A whole module trained as a copy of its own (``modules_to_save``)."""

    replaces = True

    def __init__(self, module: nn.Module, path: str) -> None:
        nn.Module.__init__(self)
        self.module = copy.deepcopy(module).requires_grad_(True)
        kind = kind_of(module)
        self.site = kind(Standing(self.module, path)) if kind else None

    @property
    def dtype(self) -> torch.dtype:
        return next(
            (p.dtype for p in self.module.parameters() if p.is_floating_point()),
            torch.get_default_dtype(),
        )

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.site is not None
        return self.site.weight, self.site.bias

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]

    def hides(self, beneath: Adapter) -> bool:
        return True

    def tied_tensors(self, transposed: bool) -> dict[str, Tensor]:
        return {"weight": self.module.weight}  # type: ignore[dict-item]

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def file_tensors(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict(keep_vars=True))

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        for name, mine in self.file_tensors().items():
            if name in tensors:
                mine.copy_(tensors[name])


class Bias(Adapter):
    """A layer's bias, trained: b' = b + (bias - bias at the start)."""

    keys = {"bias": "bias"}
    replaces = True

    def __init__(self, site: Site) -> None:
        nn.Module.__init__(self)
        assert site.bias is not None
        self.bias = nn.Parameter(site.bias.detach().clone())
        self.register_buffer("origin", site.bias.detach().clone(), persistent=False)
        self.origin: Tensor

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.bias - self.origin
        return w, change if b is None else b + change

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        return layer(x) + layer.site.outputs(self.bias - self.origin)


class Whole(Adapter):
    """One parameter of a module, trained as a whole: its value is this part's."""

    replaces = True

    def __init__(self, site: Site) -> None:
        nn.Module.__init__(self)
        self.value = nn.Parameter(site.raw.detach().clone())
        self.keys = {"value": site.parameter.rpartition(".")[2]}  # type: ignore[misc]

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.value, b


class Tied(Adapter):
    """The other end of a tied weight: the same update as the adapter at the first end, which owns
    the tensors.

    Args:
        source: the adapter at the first end.
        transposed: whether the two ends see the weight transposed (an embedding and an output
            layer).
        saved: whether PEFT's file repeats the tensors for this end.
    """

    def __init__(self, source: Adapter, transposed: bool, saved: bool = False) -> None:
        nn.Module.__init__(self)
        self.saved = saved
        self.source = (source,)  # in a tuple: referred to, not owned
        self.transposed = transposed
        self.replaces = source.replaces  # type: ignore[misc]

    @property
    def dtype(self) -> torch.dtype:
        return self.source[0].dtype

    def precise(self) -> Tied:
        return Tied(self.source[0].precise(), self.transposed)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.transposed:
            return self.source[0].fold(w, b)
        return self.source[0].fold(w.mT, None)[0].mT, b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if not self.transposed:
            return self.source[0](x, layer)  # type: ignore[no-any-return]
        return self.source[0].forward_transposed(x, layer)

    def delta_norm(self, w: Tensor) -> float:
        return self.source[0].delta_norm(w.mT if self.transposed else w)

    def rank(self) -> int | None:
        return self.source[0].rank()

    def file_tensors(self) -> dict[str, Tensor]:
        return self.source[0].tied_tensors(self.transposed) if self.saved else {}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        """Nothing: the first end takes the values."""
