"""aLoRA (arXiv 2504.12397): LoRA from the last invocation in a row on; before it the base model, so
that what was computed there can be used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import Adapter, Beneath, Embedding, Site
from ..errors import StateError
from ..fast.rows import tensors_in
from .lora import LoRA
from .lora_config import LoraConfig

FAR = 2**31  # beyond every position


class ALoRA(LoRA):
    """LoRA with a mask over positions."""

    FORBIDS = {
        "merge": "it acts on some positions of a row, which depend on the row's tokens",
        "layers": "it acts on single positions of a row, which such a layer mixes or does not show",
    }
    factored = Adapter.factored

    def __init__(self, config: LoraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        if not site.pointwise and not isinstance(site, Embedding):
            raise ValueError(
                f"aLoRA cannot sit at {site.path} {site.describe()}: {self.FORBIDS['layers']}; "
                "leave it out of target_modules"
            )
        self.called = name_of(config.alora_invocation_tokens or ())

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        y, added, shift = layer(x), self.branch(self.dropped(x), layer.site), self.shift()
        added = added if shift is None else added + shift
        out: Tensor = y + added * self.mask(y, layer).to(y.dtype)
        return out

    def mask(self, y: Tensor, layer: Beneath) -> Tensor:
        """Where it acts, (..., 1): from the start of the invocation to the end of the row."""
        calls = self.calls(layer)  # (rows, 2)
        n = len(y) if y.ndim > 2 else len(calls)  # beams of a row stand next to each other
        offset, length = calls.to(y.device).repeat_interleave(n // len(calls), 0).T
        t = y[..., 0].numel() // n
        # with a cache the positions are the last ones; without it the prompt has grown at its end
        start = length.clamp(max=t) - offset
        acts: Tensor = torch.arange(t, device=y.device) >= start[:, None]
        shape = (*y.shape[:-1], 1)
        return acts.reshape(shape)

    def calls(self, layer: Beneath) -> Tensor:
        """For each row how far from its end the invocation starts, and where that end is."""
        given: Any = layer.context.get("alora_offsets")
        found: Tensor | None = layer.context.get(self.called)
        if given is None:
            if found is None:
                raise StateError(
                    f"{layer.site.path} needs to know where aLoRA is invoked: call the model with "
                    "input_ids, or with alora_offsets, for each row the number of tokens from the "
                    "invocation's start to the end (0: never)"
                )
            return found
        if not isinstance(given, Tensor):
            given = torch.tensor([offset or 0 for offset in given])
        return torch.stack([given, torch.full_like(given, FAR)], dim=1)


def name_of(tokens: Sequence[int]) -> str:
    """The name of a call's value for an invocation."""
    return "_".join(["alora", *map(str, tokens)])


def invoked(tokens: Sequence[int], args: Any, kwargs: Any) -> dict[str, Any]:
    """Where the last invocation starts in each row of the ids of a call, (rows, 2): see ``calls``.

    Rows without one are never touched.
    """
    ids = kwargs.get("input_ids")
    ids = next((t for t in tensors_in(args) if t.dtype == torch.long), None) if ids is None else ids
    if ids is None:
        return {}
    n, k = ids.shape[1], len(tokens)
    offset = ids.new_full((len(ids),), -FAR)
    if n >= k:
        same = (ids.unfold(1, k, 1) == ids.new_tensor(tokens)).all(-1)  # (rows, starts)
        starts = torch.arange(n - k + 1, device=ids.device)
        offset = torch.where(same, n - starts, FAR).amin(1)
        offset = torch.where(offset == FAR, -FAR, offset)
    return {name_of(tokens): torch.stack([offset, torch.full_like(offset, n)], dim=1)}
