"""A transformer of two blocks, for methods that sit at no layer but follow the whole model."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from .entry import IDS
from .layers import Kind


class Blocks(LlamaForCausalLM):  # type: ignore[misc]
    """It gives the logits of its tokens, unless it is asked for more."""

    @wraps(LlamaForCausalLM.forward)  # a shadow looks at what it takes
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        # virtual tokens stand in front, and have logits too
        return out if kwargs.get("output_hidden_states") else out.logits[:, -IDS.shape[1] :]


def blocks(tied: bool = False) -> Blocks:
    """The model; ``tied``: its output layer to its embedding."""
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return Blocks(config)


BLOCKS = Kind(blocks, IDS, "a transformer of two blocks", fields={}, whole=True)
