"""The masks of attention functions, over keys with more of them in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError


def kind_of(function: Any) -> str:
    """What masks an attention function takes: those of "eager", "sdpa", "flex" or "flash".

    Raises:
        StateError: it keeps keys in pages, behind our back.
    """
    name = getattr(function, "__name__", "")
    if "paged" in name:
        raise StateError(
            "keys and values cannot stand in front of those in pages (continuous batching); use "
            "model.generate"
        )
    return next((kind for kind in ("eager", "flex", "flash") if kind in name), "sdpa")


@dataclass(frozen=True)
class View:
    """Which of ``n`` keys in front a query sees.

    Args:
        kind: what masks the attention function takes.
        n: how many there are.
        own: which of them are a row's own, (batch, n); None: all.
        causal: whether a query sees no later token.
        window: how far back it sees; None: all the way.
    """

    kind: str
    n: int
    own: Tensor | None
    causal: bool
    window: int | None

    def lengthened(self, mask: Any, q: Tensor, k: Tensor) -> Any:
        """A mask over the keys k, (batch or 1, heads or 1, queries, keys), with n more in front.

        None means that all are seen, but where a function is causal by itself; flash attention's
        masks are (batch, keys), those of flex attention blocks.
        """
        if self.kind == "flash":
            return self.two_axes(mask, q, k)
        if mask is None and self.causal and q.shape[2] > 1 and self.kind != "eager":
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(k.shape[2] - q.shape[2])[None, None]
        if self.kind == "flex" and not isinstance(mask, Tensor):
            return self.blocks(mask, q, k)
        first = self.visible(mask, k)
        if mask is None:
            if first is None:
                return None
            mask = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
            mask = mask if self.kind == "sdpa" else torch.zeros_like(mask, dtype=q.dtype)
        if first is None:
            first = torch.ones(1, 1, 1, self.n, dtype=torch.bool, device=k.device)
        if mask.dtype != torch.bool:
            least = torch.finfo(mask.dtype).min
            first = torch.zeros_like(first, dtype=mask.dtype).masked_fill(~first, least)
        return beside(first, mask)

    def two_axes(self, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """The same for a mask (batch, keys); the function knows windows itself."""
        if mask is None and self.own is None:
            return None
        mask = torch.ones(len(q), k.shape[2], device=k.device).long() if mask is None else mask
        first = mask.new_ones(len(q), self.n) if self.own is None else self.own.to(mask)
        return torch.cat([first, mask.expand(len(q), -1)], dim=-1)

    def visible(self, mask: Tensor | None, k: Tensor) -> Tensor | None:
        """Which ones a query sees, (batch or 1, 1, queries or 1, n); None: all of them."""
        own = None if self.own is None else self.own[:, None, None]
        if self.window is None or self.n + k.shape[2] <= self.window:
            return own
        if mask is None:
            back = torch.tensor(k.shape[2], device=k.device).view(1, 1, 1, 1)
        else:
            back = bools(mask)[:, :1].sum(-1, keepdim=True)  # one that sees fewer than the window
        place = torch.arange(self.n, device=k.device)  # allows is that far from the first one
        near = self.n - place + back - 1 < self.window
        return near if own is None else near & own

    def dense(self, mask: Any, q: Tensor, k: Tensor) -> Tensor | None:
        """A mask as bools, (batch or 1, heads or 1, queries or 1, keys); None: all are seen."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            from torch.nn.attention.flex_attention import create_mask

            size = len(q), 1, q.shape[2], k.shape[2]
            return create_mask(mask.mask_mod, *size, device=str(q.device))
        return bools(mask)

    def blocks(self, mask: Any, q: Tensor, k: Tensor) -> Any:
        """The same for flex attention's block mask, or None."""
        from torch.nn.attention.flex_attention import create_block_mask

        n, own, device, dense = self.n, self.own, str(q.device), None
        if self.window is not None and n + k.shape[2] > self.window:
            seen = self.visible(self.dense(mask, q, k), k)
            assert seen is not None
            dense = seen.expand(len(q), 1, q.shape[2], n)[:, 0]

        def shown(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            first, rest, at = j < n, j >= n, j.clamp(max=n - 1)
            if dense is not None:
                first = first & dense[b, i, at]
            elif own is not None:
                first = first & own[b, at]
            if mask is not None:
                rest = rest & mask.mask_mod(b, h, i, (j - n).clamp(min=0))
            return first | rest

        return create_block_mask(shown, len(q), None, q.shape[2], n + k.shape[2], device=device)


def beside(first: Tensor, rest: Tensor) -> Tensor:
    """Values (..., n) and (..., keys) as (..., n + keys), the other axes as the longer has them."""
    axes = [max(pair) for pair in zip(first.shape[:-1], rest.shape[:-1], strict=True)]
    return torch.cat([first.expand(*axes, -1), rest.expand(*axes, -1)], dim=-1)


def bools(mask: Tensor) -> Tensor:
    """What a mask shows; one that is added hides by its least value."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def places_of(shown: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """Where each query stands among the tokens of its row, (batch or 1, queries); padding on the
    left is not counted, and keys of a cache may follow that hold nothing yet.
    """
    queries, keys = q.shape[2], k.shape[2]
    every = torch.arange(keys, device=k.device)
    if shown is None:
        return every[None, keys - queries :]
    pads = (shown[:, 0, -1].cumsum(-1) == 0).sum(-1, keepdim=True)
    at = every[None] if queries == keys else (shown[:, 0] * every).amax(-1)
    return (at - pads).clamp(min=0)
