"""Trained rows of an embedding, or of an output layer: W'[t] = rows[i], t = indices[i]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Adapter, Beneath, Embedding, Site


class Tokens(Adapter):
    """Learned rows (n, dim) for n tokens."""

    keys = {"rows": "trainable_tokens_delta"}
    replaces = True

    def __init__(self, config: Any, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        self.columns = isinstance(site, Embedding)  # else an output layer: a token is a row of W
        if not self.columns and not (site.pointwise and site.parameter == "weight"):
            raise ValueError(f"{site.path} {site.describe()} has no tokens: name an embedding")
        dim, tokens = site.shape if self.columns else site.shape[::-1]
        indices = list(config.token_indices)
        if bad := [i for i in indices if not 0 <= i < tokens]:
            raise ValueError(
                f"token_indices {bad} are not among {tokens} tokens of {site.path}; resize it "
                f"first: model.resize_token_embeddings({max(indices) + 1}), as the classes do that "
                "load base and adapter together (AutoPeftModelForCausalLM)"
            )
        if not indices or len(set(indices)) < len(indices):
            raise ValueError(f"token_indices must name a token at least, and each once: {indices}")
        self.indices = nn.Buffer(torch.tensor(indices), persistent=False)
        self.random = not config.init_weights
        self.rows = nn.Parameter(torch.empty(len(indices), dim))

    def start(self, site: Site) -> None:
        table = site.weight.mT if self.columns else site.weight  # (tokens, dim)
        nn.init.normal_(self.rows) if self.random else self.rows.copy_(table[self.indices])

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.columns:
            return w.index_copy(1, self.indices, self.rows.mT), b
        return w.index_copy(0, self.indices, self.rows), b

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        if not self.columns:
            return self.forward_transposed(x, layer)
        which = x[..., None] == self.indices  # (..., n)
        assert isinstance(layer.site, Embedding)
        own = layer.site.scaled(self.rows[which.to(torch.uint8).argmax(-1)])
        return torch.where(which.any(-1, keepdim=True), own, layer(x))

    def forward_transposed(self, x: Tensor, layer: Beneath) -> Tensor:
        # the columns of the output that are these tokens'
        logits, bias = x @ self.rows.mT, layer.bias
        if bias is not None:
            logits = logits + bias[self.indices]
        return layer(x).index_copy(-1, self.indices, logits)

    def tied_tensors(self, transposed: bool) -> dict[str, Tensor]:
        return self.file_tensors()

    def hides(self, beneath: Adapter) -> bool:
        return isinstance(beneath, Tokens) and bool(torch.isin(beneath.indices, self.indices).any())

    def change(self, w: Tensor) -> Tensor:
        """What the rows add to those of the weight w, (n, dim)."""
        return self.rows - (w[:, self.indices].mT if self.columns else w[self.indices])

    def delta_norm(self, w: Tensor) -> float:
        return float(self.change(w).norm())
