"""What is trained as a whole: W' = W_new, from a copy. Modules, biases, and single parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.adapter import NOTHING, Adapter
from ..engine.site import ParameterSite, Site, Standing, kind_of
from ..fast.shards import in_parts, parts_in, split
from ..fast.tensors import copied, settled

if TYPE_CHECKING:
    from ..engine.host import Beneath, Host


class Copy(Adapter):
    """A whole module trained as a copy of its own."""

    replaces = True

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        if how := parts_in([module]):
            raise in_parts(path, how, "copied")
        self.module = copied(module).requires_grad_(True)
        kind = kind_of(module)
        self.site = kind(Standing(self.module, path)) if kind else None

    @property
    def dtype(self) -> torch.dtype:
        floats = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floats, torch.get_default_dtype())

    def instead(self) -> nn.Module:
        return settled(self.module)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.site is not None
        return self.site.weight, self.site.bias

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        return settled(self.module)(x)  # type: ignore[no-any-return]

    def hides(self, beneath: Adapter) -> bool:
        return True

    def tied_tensors(self, transposed: bool) -> dict[str, Tensor]:
        return {"weight": self.module.weight}  # type: ignore[dict-item]

    def file_tensors(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict(keep_vars=True))

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        for name, mine in self.module.state_dict(keep_vars=True).items():
            if name in tensors:
                mine.copy_(tensors[name])


def whole(host: Host, key: str, kind: type[Copy] = Copy) -> Adapter:
    """What trains at a place as a whole: the module there, or one bare parameter of it."""
    site = host.site_of(key)
    return Whole(site) if isinstance(site, ParameterSite) else kind(host.base_layer, host.path)


class Bias(Adapter):
    """A layer's bias, trained: b' = b + (bias - bias at the start)."""

    keys = {"bias": "bias"}
    replaces = True
    origin: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert site.bias is not None
        if how := split(site.bias):
            raise in_parts(site.path, how, "copied")
        self.bias = nn.Parameter(site.bias.detach().clone())
        self.register_buffer("origin", site.bias.detach().clone(), persistent=False)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.bias - self.origin
        return w, change if b is None else b + change

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        return *NOTHING, self.bias - self.origin

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        return layer(x) + layer.site.outputs(self.bias - self.origin)


class Whole(Adapter):
    """One parameter of a module: its value is this part's."""

    replaces = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        if how := split(site.raw):
            raise in_parts(site.path, how, "copied")
        self.site, self.value = site, nn.Parameter(site.raw.detach().clone())
        self.keys = {"value": site.parameter.rpartition(".")[2]}

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.site.to_matrix(self.value), b

    def hides(self, beneath: Adapter) -> bool:
        return True
