"""P-tuning (arXiv 2103.10385): the model reads [f(E); x], f a small network over a table E: three
linear layers with relu between them, or an LSTM in both directions and two linear layers. A file
holds f(E).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Site
from ..fast.tensors import steady
from ..fields import choice, probability, whole
from ..targets.offer import Offer
from .config import idle, unmade
from .tokens import Tokens, TokensConfig


class Lstm(nn.LSTM):
    """The states at every place, without the last ones."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        states: Tensor = super().forward(x)[0]
        return states


class Encoded(Tokens):
    """E (total, width) and f; where it does not train, f(E) instead of both."""

    def __init__(self, config: PromptEncoderConfig, site: Site) -> None:
        super().__init__(config, site)
        self.resumes, self.f = not config.inference_mode, None
        if self.resumes:
            with torch.device("meta"):
                empty = config.network()
            self.f = empty.to_empty(device=self.E.device)

    def start(self) -> None:
        super().start()
        if self.f is not None:
            with torch.device("cpu"):  # layers are drawn as they are made, in PEFT's order
                drawn = self.config.network()
            for mine, new in zip(self.f.parameters(), drawn.parameters(), strict=True):
                mine.copy_(new)

    def whole(self) -> Tensor:
        if self.f is None:
            return self.E
        made: Tensor = self.f(self.E)
        return made

    @torch.no_grad()  # torch has an LSTM for either case, and a file is there to answer
    def file_tensors(self) -> dict[str, Tensor]:
        with steady([self]):
            return {"prompt_embeddings": self.whole()}

    def take(self, tensors: Any, config: Any) -> None:
        if self.f is not None:
            raise unmade(self.config, "PromptTuningConfig")
        super().take(tensors, config)


@dataclass
class PromptEncoderConfig(TokensConfig, method="P_TUNING"):
    """Rows in front of the tokens' embeddings, made by a network that trains."""

    encoder_reparameterization_type: str = choice("MLP", "LSTM")  # the network
    encoder_hidden_size: int | None = whole(None)  # its width; None: token_dim
    encoder_num_layers: int = whole(2)  # of the LSTM
    encoder_dropout: float = probability(0.0)  # between the layers of the LSTM

    MADE = Encoded

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def __post_init__(self) -> None:
        super().__post_init__()
        lstm, layers = self.encoder_reparameterization_type == "LSTM", self.encoder_num_layers
        if not lstm and layers != 2:
            idle(self, f"encoder_num_layers={layers} is of the LSTM; the MLP always has three "
                 "linear layers. Leave it out")  # fmt: skip
        if self.encoder_dropout and not (lstm and layers > 1):
            idle(self, "encoder_dropout acts between the layers of the LSTM, and there are none; "
                 "leave it out, or use 'LSTM' with two layers or more")  # fmt: skip

    def network(self) -> nn.Sequential:
        """f, newly drawn."""
        width, hidden = self.token_dim or 1, self.encoder_hidden_size or 1
        if self.encoder_reparameterization_type == "LSTM":
            layers = self.encoder_num_layers
            dropout = self.encoder_dropout if layers > 1 else 0.0
            first: nn.Module = Lstm(width, hidden, layers, dropout=dropout, bidirectional=True,
                                    batch_first=True)  # fmt: skip
            hidden, between = 2 * hidden, []
        else:
            first, between = nn.Linear(width, hidden), [nn.ReLU()]
        middle = [*between, nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)]
        return nn.Sequential(first, *middle)
