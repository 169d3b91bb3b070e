"""Tied weights: one adapter at both ends. Under merging, ends that agree stay one tensor, and ends
that differ are untied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .host import Host
from .site import Embedding, Site, kind_of
from .switch import Switch
from .tree import inside, mark, walk

if TYPE_CHECKING:
    from .host import Beneath


class Tied(Adapter):
    """The other end of a tied weight: the same update as that of ``source`` at the first end.

    ``transposed``: the ends see the weight transposed (an embedding and an output layer);
    ``saved``: PEFT's file repeats the tensors for this end.
    """

    def __init__(self, source: Adapter, transposed: bool, saved: bool = False) -> None:
        super().__init__()
        self.source = (source,)  # in a tuple: referred to, not owned
        self.transposed, self.saved = transposed, saved
        self.replaces = source.replaces

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

    def hides(self, beneath: Adapter) -> bool:
        return self.source[0].hides(beneath)

    def delta_norm(self, w: Tensor) -> float:
        return self.source[0].delta_norm(w.mT if self.transposed else w)

    def rank(self) -> int | None:
        return self.source[0].rank()

    def file_tensors(self) -> dict[str, Tensor]:
        return self.source[0].tied_tensors(self.transposed) if self.saved else {}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        """Nothing: the first end takes the values."""


def commit(
    model: nn.Module,
    names: tuple[str, ...],
    prepared: Iterable[tuple[Host, dict[str, Tensor]]],
    keep: bool | str,
    switch: Switch,
) -> None:
    """Put merged weights in place; the model's config is told where a tie came loose."""
    before = _groups(model)
    seen: dict[Any, Tensor] = {}
    for host, new in prepared:
        for key, value in new.items():
            twin = seen.setdefault(mark(host.pristine(key)), value)
            if twin is not value and (value.is_meta or torch.equal(twin, value)):
                new[key] = twin
        host.commit(names, new, keep)
    loose = any(len({id(m._parameters["weight"]) for m in group}) > 1 for group in before)
    config: Any = getattr(model, "config", None)
    if loose and getattr(config, "tie_word_embeddings", False):
        keys = getattr(model, "all_tied_weights_keys", None)  # transformers' own list
        if keep and switch.tied is None:
            switch.tied = {"all_tied_weights_keys": keys}
        config.tie_word_embeddings = False  # else saving or loading would tie them again
        if keys is not None:
            model.all_tied_weights_keys = type(keys)()


def restore(model: Any, switch: Switch) -> None:
    """The config as it was before merging."""
    if switch.tied is not None:
        model.config.tie_word_embeddings = True
        if (keys := switch.tied["all_tied_weights_keys"]) is not None:
            model.all_tied_weights_keys = keys
        switch.tied = None


def _groups(model: nn.Module) -> list[list[nn.Module]]:
    """The layers whose weight is that of an embedding now; others share theirs with copies."""
    found: dict[int, dict[int, nn.Module]] = {}
    for layer in (inside(module) for _, module in walk(model)):
        if (weight := layer._parameters.get("weight")) is not None:
            found.setdefault(id(weight), {})[id(layer)] = layer
    groups = (list(group.values()) for group in found.values() if len(group) > 1)
    return [g for g in groups if any(issubclass(kind_of(m) or Site, Embedding) for m in g)]
