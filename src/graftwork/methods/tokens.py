"""Trainable tokens: W'[t] = rows[i] for a token t = token_indices[i], else W[t]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftType, TargetConfig
from ..engine.adapter import Adapter
from ..engine.host import Beneath
from ..engine.site import Embedding, Site


@dataclass
class TrainableTokensConfig(TargetConfig):
    """Rows of the embedding, trained; at both ends where it is tied to the output layer."""

    token_indices: list[int] = field(
        default_factory=list
    )  # ids of the tokens whose rows are trained
    init_weights: bool = True  # False: random rows

    METHOD = PeftType.TRAINABLE_TOKENS
    EMBEDDINGS = True
    ensure_weight_tying: ClassVar[bool] = True
    BEYOND = TargetConfig.BEYOND | {
        "layers_to_transform",
        "layers_pattern",
        "exclude_modules",
        "modules_to_save",
    }

    def adapter(self) -> type[Adapter]:
        return Tokens


class Tokens(Adapter):
    """Learned rows (n, dim) for n tokens."""

    keys: ClassVar[dict[str, str]] = {"rows": "trainable_tokens_delta"}
    replaces = True

    def __init__(self, config: TrainableTokensConfig, site: Site) -> None:
        super().__init__(config, site)
        table = site.weight.mT if isinstance(site, Embedding) else site.weight  # (tokens, dim)
        indices = list(config.token_indices)
        if bad := [i for i in indices if not 0 <= i < len(table)]:
            raise ValueError(
                f"token_indices {bad} are not in the {len(table)} tokens of {site.path}; resize "
                "it first"
            )
        if not indices or len(set(indices)) < len(indices):
            raise ValueError(
                f"token_indices must name each token once, and at least one; they are {indices}"
            )
        self.register_buffer("indices", torch.tensor(indices), persistent=False)
        self.indices: Tensor
        self.columns = isinstance(
            site, Embedding
        )  # a token is a column of W at an embedding, a row at an output layer
        self.random = not config.init_weights
        self.rows = nn.Parameter(torch.empty(len(indices), table.shape[1]))

    def start(self, site: Site) -> None:
        table = site.weight.mT if self.columns else site.weight
        nn.init.normal_(self.rows) if self.random else self.rows.copy_(table[self.indices])

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (
            w.index_copy(1, self.indices, self.rows.mT)
            if self.columns
            else w.index_copy(0, self.indices, self.rows)
        ), b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if not self.columns:
            return self.forward_transposed(x, layer)
        y = layer(x)  # (..., dim)
        which = x[..., None] == self.indices
        hit = which.any(-1, keepdim=True)
        return torch.where(hit, layer.site.scaled(self.rows[which.to(torch.uint8).argmax(-1)]), y)  # type: ignore[attr-defined]

    def forward_transposed(self, x: Tensor, layer: Beneath) -> Tensor:
        logits = x @ self.rows.mT  # the chosen tokens' columns of the output
        bias = layer.bias
        if bias is not None:
            logits = logits + bias[self.indices]
        return layer(x).index_copy(-1, self.indices, logits)

    def hides(self, beneath: Adapter) -> bool:
        return isinstance(beneath, Tokens) and bool(torch.isin(beneath.indices, self.indices).any())

    def delta_norm(self, w: Tensor) -> float:
        old = w[:, self.indices].mT if self.columns else w[self.indices]
        return float((self.rows - old).norm())
