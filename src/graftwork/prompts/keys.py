"""The keys and values of every layer as one table, and the part of it that one attention reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine import Adapter, Host, Shared
from .attention import acting, install
from .config import unmade
from .fronts import Fronts

if TYPE_CHECKING:
    from .prefix import PrefixConfig


class Table(Shared):
    """E (n, layers x 2 x width), or E (n, width) and the two layers that make that of it."""

    inside = True

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__()
        self.config, self.n, self.moves = config, config.n, config.first
        self.biasing: tuple[Any, ...] = ()
        width, hidden = config.token_dim or 0, config.hidden
        self.projects = self.resumes = bool(hidden) and not config.inference_mode
        out = 2 * (config.num_layers or 0) * width
        self.E = nn.Parameter(torch.empty(self.n, width if self.projects else out))
        self.first, self.second = None, None
        if self.projects:
            with torch.device("meta"):
                first, second = nn.Linear(width, hidden), nn.Linear(hidden, out)
            self.first = first.to_empty(device=self.E.device)
            self.second = second.to_empty(device=self.E.device)

    def start(self) -> None:
        with torch.device("cpu"):  # drawn as PEFT does
            self.E.copy_(torch.empty(self.E.shape).normal_())
            for layer in (self.first, self.second):
                if layer is not None:
                    drawn = nn.Linear(layer.in_features, layer.out_features)
                    layer.load_state_dict(drawn.state_dict())
        for p in [self.E] if self.second is None else self.second.parameters():
            p.mul_(self.config.scale)

    def rows(self, place: int) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, n, size) of one layer."""
        width, heads = self.config.token_dim or 1, self.config.num_attention_heads or 1
        at = slice(2 * place * width, 2 * (place + 1) * width)
        if self.first is None or self.second is None:
            both = self.whole()[:, at]
        else:
            hidden = self.first(self.E).tanh()
            both = nn.functional.linear(hidden, self.second.weight[at], self.second.bias[at])
        k, v = both.reshape(len(both), 2, heads, -1).unbind(1)
        return k.transpose(0, 1), v.transpose(0, 1)

    def whole(self) -> Tensor:
        """What a file holds, (n, layers x 2 x width)."""
        if self.first is None or self.second is None:
            return self.E
        made: Tensor = self.second(self.first(self.E).tanh())
        return made

    def file_tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.whole()}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        if self.projects:
            raise unmade(self.config, type(self.config).__name__)
        self.put(tensors["prompt_embeddings"])

    def put(self, values: Tensor) -> None:
        """Take the values of what a file holds."""
        self.E.copy_(values)


class Prefix(Adapter):
    """One attention's part of the table."""

    beside = inside = True
    FORBIDS = {"merge": "it adds keys and values, which no weight of a layer holds"}

    def __init__(self, config: PrefixConfig, host: Host, shared: Table) -> None:
        super().__init__(config, None, shared)
        module: Any = host.base_layer
        install(module)
        self.place = config.layout[host.path]
        if getattr(module, "has_relative_attention_bias", False):
            shared.biasing = (module,)
        self.biasing = shared.biasing  # of T5: the first attention makes the biases of all

    def around(
        self,
        run: Callable[[], Any],
        module: nn.Module,
        parts: Sequence[Any],
        choice: Tensor | None,
    ) -> Any:
        pairs = [part.shared.rows(part.place) for part in parts]
        with acting(module, Fronts(pairs, choice, self.bias if self.biasing else None)):
            return run()

    def bias(self, n: int, keys: int, at: Tensor) -> Tensor:
        """T5's biases of n keys in front, as if in the cache, for queries at these places, (batch
        or 1, heads, queries, n).
        """
        module = self.biasing[0]
        new = "past_seen_tokens" in inspect.signature(module.compute_bias).parameters
        options = {"past_seen_tokens": n} if new else {"cache_position": torch.arange(n, n + keys)}
        every = module.compute_bias(keys, n + keys, **options)[0, ..., :n]  # (heads, keys, n)
        bias: Tensor = every[:, at.to(every.device)].transpose(0, 1)
        return bias

    def start(self, site: Any) -> None:
        pass

    def delta_norm(self, w: Tensor) -> float:
        return float("nan")
