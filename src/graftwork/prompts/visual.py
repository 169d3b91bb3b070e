"""Visual prompt tuning (arXiv 2203.12119): the encoder of a picture reads [CLS; E; patches], rows E
that train. They enter behind the positions of the patches, which they do not move.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import Adapter, Host, Shared
from ..errors import TargetError
from ..targets.offer import Offer
from .attention import acting, attends, install
from .layers import crosses, is_encoder_decoder
from .masks import View, kind_of

SPECIAL = ("cls_token", "class_embedding")


def stage(offer: Offer) -> str | None:
    """The module that puts [CLS] in front of the patches; None: the model reads tokens.

    Raises:
        TargetError: it reads neither, so that rows in front of its input have no place.
    """
    model, kind = offer.model, type(offer.model).__name__
    known = inspect.signature(model.forward).parameters
    if not hasattr(model, "main_input_name"):  # none of transformers' models
        return None
    found = [p for p, m in offer.modules.items() if any(n in m._parameters for n in SPECIAL)]
    if "input_ids" in known and "inputs_embeds" in known:
        return None
    if "input_ids" not in known and found:
        return found[0]
    why = (
        "takes no embeddings instead of tokens, so rows cannot stand in front of them"
        if "input_ids" in known
        else f"reads {model.main_input_name}, no tokens and no patches behind a [CLS], so rows in "
        "front of those would do nothing"
    )
    raise TargetError(
        f"a {kind} {why}; use prefix tuning, which works inside attention: PrefixTuningConfig"
    )


class Rows(Shared):
    """E (n, width)."""

    keys = {"E": "prompt_embeddings"}
    inside, moves, decodes = True, False, False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.n = config, config.n
        self.E = nn.Parameter(torch.empty(config.n, config.token_dim))
        self.special = 0  # how many tokens stand in front

    def start(self) -> None:
        self.E.copy_(torch.empty(self.E.shape, device="cpu").normal_())

    def whole(self) -> Tensor:
        """The rows, (n, width)."""
        return self.E


class _Inside(Adapter):
    beside = inside = True
    FORBIDS = {"merge": "it adds tokens to the input, which no weight holds"}

    def start(self, site: Any) -> None:
        pass

    def delta_norm(self, w: Tensor) -> float:
        return float("nan")


class Between(_Inside):
    """At the module that puts [CLS] in front of the patches: E between them."""

    def __init__(self, config: Any, host: Host, shared: Rows) -> None:
        super().__init__(config, None, shared)
        own: Any = host.base_layer._parameters
        more = own.get("register_tokens")  # of DINOv2; DeiT distils with a second token
        shared.special = 1 + ("distillation_token" in own) + (0 if more is None else more.shape[1])

    def around(
        self, run: Callable[[], Any], module: nn.Module, parts: Sequence[Any], choice: Tensor | None
    ) -> Any:
        out = run()
        x = out[0] if isinstance(out, tuple) else out
        rows, at = [part.shared.E.to(x) for part in parts], self.shared.special
        if choice is None:
            own = torch.cat(rows).expand(len(x), -1, -1)
        else:
            n = max(map(len, rows))
            padded = [F.pad(row, (0, 0, n - len(row), 0)) for row in rows]
            own = torch.stack([*padded, torch.zeros_like(padded[0])])[choice]
        x = torch.cat([x[:, :at], own, x[:, at:]], dim=1)
        return (x, *out[1:]) if isinstance(out, tuple) else x


class Hiding(_Inside):
    """At an attention: no row sees the places that it has no E for."""

    def __init__(self, config: Any, host: Host, shared: Rows) -> None:
        super().__init__(config, None, shared)
        install(host.base_layer)

    def around(
        self, run: Callable[[], Any], module: nn.Module, parts: Sequence[Any], choice: Tensor | None
    ) -> Any:
        lengths = [*(part.shared.n for part in parts), 0]
        if choice is None:
            return run()
        at, n = self.shared.special, max(lengths)
        own = torch.tensor(lengths, device=choice.device)[choice]
        absent = torch.arange(n, device=choice.device) < n - own[:, None]  # (batch, n)

        def act(attend: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any,
                *args: Any, **kwargs: Any) -> Any:  # fmt: skip
            first = k.shape[2] - q.shape[2] + at  # keys of a prefix may be in front
            rest = k.shape[2] - first - n
            seen = torch.cat([F.pad(~absent, (first, 0), value=True),
                              absent.new_ones(len(absent), rest)], dim=1)  # fmt: skip
            mask = hidden(kind_of(attend), mask, seen, q)
            return attend(module, q, k, v, mask, *args, **kwargs)

        with acting(module, act):
            return run()


def hidden(kind: str, mask: Any, seen: Tensor, q: Tensor) -> Any:
    """A mask of an encoder, or None, that hides keys as well, (batch, keys)."""
    if mask is None:
        keys = q.new_zeros(len(q), 1, 0, q.shape[-1])  # as if all keys stood in front of none
        return View(kind, seen.shape[1], seen, False, None).lengthened(None, q, keys)
    if not isinstance(mask, Tensor):
        raise TargetError(
            "prompts of several lengths, flex attention and a mask do not go together"
        )
    if mask.ndim == 2:
        return mask * seen
    shown = seen[:, None, None]
    if mask.dtype == torch.bool:
        return mask & shown
    return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)


def places(offer: Offer, path: str) -> set[str]:
    """Where the parts sit: at ``path``, and at the attentions over what it gives."""
    model: Any = offer.model
    stack = model.get_encoder() if is_encoder_decoder(model) else model
    inner = {id(m) for m in stack.modules()}
    attentions = [p for p, m in offer.modules.items() if id(m) in inner and attends(m)]
    return {path, *(p for p in attentions if not crosses(p, offer.modules[p]))}


def part(config: Any, host: Host, shared: Rows) -> Adapter:
    """The part at one of them."""
    return (Hiding if attends(host.base_layer) else Between)(config, host, shared)
