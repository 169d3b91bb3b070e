"""Where virtual tokens and others stand in the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.switch import Call
from ..errors import StateError
from ..fast.rows import expand, take


@dataclass(frozen=True)
class Own:
    """How many virtual tokens rows have.

    Args:
        each: as a tensor, (rows, 1), or (1, 1) where all have the same.
        most: the largest of them.
        even: whether all are the same.
    """

    each: Tensor
    most: int
    even: bool


class Order:
    """How virtual tokens and others stand: padding on the left, virtual tokens, the others.

    Args:
        own: how many of the ``n`` virtual places are a row's own: the last ones.
        mask: over the others (rows, t), or over all (rows, n + t) already.
        t: how many others there are; 0: as many as ``mask`` says.
        pack: whether padding on the right goes to the left.
    """

    def __init__(self, own: Own, mask: Tensor, t: int, pack: bool = False) -> None:
        self.n = n = own.most
        missing = n - own.each.to(mask.device)
        place = torch.arange(n, device=mask.device)
        done = bool(t) and mask.shape[1] == n + t
        others = mask.argsort(dim=-1, stable=True) if pack and not done else None
        sorted_ = mask if others is None else mask.gather(1, others)
        pads = (sorted_.cumsum(-1) == 0).sum(-1, keepdim=True) - (missing if done else 0)
        self.pads = pads  # how many are in front of the virtual ones, (rows, 1)
        j = torch.arange(mask.shape[1] + (0 if done else n), device=mask.device)
        self.where = torch.where(j < pads, n + j, torch.where(j < pads + n, j - pads, j))
        if others is not None:
            packed = n + others.gather(1, (self.where - n).clamp(min=0))
            self.where = torch.where(self.where < n, self.where, packed)
        real = (place >= missing).to(mask.dtype)
        self.mask = mask if done else self.join(real, mask)

    def join(self, first: Tensor, others: Tensor) -> Tensor:
        """[virtual (rows, n, ...), others (rows, t, ...)] in this order."""
        both = torch.cat([first.expand(len(others), *first.shape[1:]), others], dim=1)
        where = self.where.reshape(*self.where.shape, *(1,) * (both.ndim - 2))
        return both.gather(1, where.expand(both.shape))

    def moved(self, index: Tensor) -> Tensor:
        """Where others stand now that stood at ``index``, (rows,) or (rows, any)."""
        return index + self.n * (index >= self.pads.reshape(-1, *(1,) * (index.ndim - 1)))


def counts(shared: dict[str, Any], call: Call, x: Tensor) -> Own:
    """How many virtual tokens each row of x has."""
    if call.rows is None:
        own = [sum(one.n for one in shared.values())]
    else:
        names = expand(call.rows, len(x), "the model")
        own = [shared[name].n if name in shared else 0 for name in names]
    each = torch.tensor(own, device=x.device)[:, None]
    return Own(each, max(own), min(own) == max(own))


def rows_of(tokens: dict[str, Any], call: Call, n: int, like: Tensor, second: bool) -> Tensor:
    """The n virtual tokens of each row, (rows, n, width), its own the last ones; ``second``: those
    of a decoder.
    """
    batch = len(like)
    if call.rows is None:
        made = [one.tokens(call.context, batch, second).to(like) for one in tokens.values()]
        return torch.cat([one.expand(batch, -1, -1) for one in made], dim=1)
    names, times = expand(call.rows, batch, "the model"), batch // len(call.rows)
    index = {name: [i for i, other in enumerate(names) if other == name] for name in tokens}
    rest = [i for i, name in enumerate(names) if name not in tokens]
    parts = [like.new_zeros(len(rest), n, like.shape[-1])]
    for name, one in tokens.items():
        where = torch.tensor(index[name], device=like.device)
        context = take(call.context, where // times, len(call.rows))
        rows = one.tokens(context, len(where), second).to(like).expand(len(where), -1, -1)
        parts.append(F.pad(rows, (0, 0, n - one.n, 0)))
    order = [i for part in (rest, *index.values()) for i in part]
    return torch.cat(parts)[torch.tensor(order, device=like.device).argsort()]


def two_axes(mask: Any) -> Tensor:
    """A mask (rows, tokens).

    Raises:
        StateError: it is another.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    what = f"has {mask.ndim} axes" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
    raise StateError(
        f"attention_mask {what}; with virtual tokens in front of the others it must be (rows, "
        "tokens)"
    )
