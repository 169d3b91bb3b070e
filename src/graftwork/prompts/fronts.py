"""Keys and values in front of those of the tokens: softmax(q [P_k; K]') [P_v; V]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import View, beside, kind_of, places_of


@dataclass(frozen=True)
class Fronts:
    """What stands in front of one attention's keys and values.

    Args:
        pairs: keys and values, (heads, n, size) each; of a smaller attention the first heads and
            the first entries, as in PEFT.
        choice: (batch,), which pair a row sees, ``len(pairs)`` for none; None: every row sees all.
        bias: (n, keys, places of the queries (batch or 1, queries)) -> (batch or 1, heads, queries,
            n), added to the scores of a model that has position biases; None: nothing is.
    """

    pairs: Sequence[tuple[Tensor, Tensor]]
    choice: Tensor | None = None
    bias: Callable[[int, int, Tensor], Tensor] | None = None

    def __call__(
        self,
        attend: Any,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # a causal window moves on over virtual tokens too, as in PEFT
        window = kwargs.get("sliding_window") if causal else None
        first = self.packed(0, k)
        n, keys = first.shape[2], k.shape[2]
        view = View(kind_of(attend), n, self.seen(), bool(causal), window)
        if (bias := kwargs.get("position_bias")) is not None:
            more = bias.new_zeros(1, 1, 1, 1)
            if self.bias is not None:
                shown = view.dense(kwargs.get("padding") if mask is None else mask, q, k)
                more = self.bias(n, keys, places_of(shown, q, k)).to(bias)
            kwargs["position_bias"] = beside(more.expand(-1, -1, -1, n), bias)
        mask = view.lengthened(mask, q, k)
        k, v = torch.cat([first, k], dim=2), torch.cat([self.packed(1, v), v], dim=2)
        return attend(module, q, k, v, mask, *args, **kwargs)

    def packed(self, i: int, like: Tensor) -> Tensor:
        """All keys (i = 0) or values (1) as (batch, heads, n, size), a row's own the last ones."""
        heads, size = like.shape[1], like.shape[3]
        parts = [pair[i][:heads, :, :size].to(like) for pair in self.pairs]
        if self.choice is None:
            return torch.cat(parts, dim=1).expand(len(like), -1, -1, -1)
        n = max(part.shape[1] for part in parts)
        padded = [F.pad(part, (0, 0, n - part.shape[1], 0)) for part in parts]
        return torch.stack([*padded, torch.zeros_like(padded[0])])[self.choice]

    def seen(self) -> Tensor | None:
        """Which of the packed ones are a row's own, (batch, n); None: all of them."""
        if self.choice is None:
            return None
        lengths = torch.tensor([*(k.shape[1] for k, _ in self.pairs), 0], device=self.choice.device)
        n = max(k.shape[1] for k, _ in self.pairs)
        return torch.arange(n, device=self.choice.device) >= n - lengths[self.choice][:, None]
