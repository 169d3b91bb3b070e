"""Trainable tokens: W'[t] = rows[i] for a token t = token_indices[i], else W[t]."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import TargetConfig
from ..engine import Adapter
from ..parts.tokens import Tokens


@dataclass
class TrainableTokensConfig(TargetConfig, method="TRAINABLE_TOKENS", peft=""):
    """Rows of the embedding, trained; at both ends where it is tied to the output layer."""

    token_indices: list[int] = field(default_factory=list)  # ids of the tokens whose rows train
    init_weights: bool = True  # False: random rows

    EMBEDDINGS = True

    def adapter(self) -> type[Adapter]:
        return Tokens
