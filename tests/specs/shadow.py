"""Shadow, which follows the blocks of a transformer; more is in tests/test_shadow.py."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from graftwork import ShadowConfig
from specs import Case


class Blocks(LlamaForCausalLM):
    """A transformer of two blocks that gives its logits, unless it is asked for more."""

    @wraps(LlamaForCausalLM.forward)  # a shadow looks at what it takes
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return out if kwargs.get("output_hidden_states") else out.logits


def blocks(tied: bool = False) -> Blocks:
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return Blocks(config)


CASES = {
    "shadow": Case(
        lambda: ShadowConfig(r=2, shadow_alpha=0.7), row="SHADOW", needs="blocks", alone=False,
        other=lambda: ShadowConfig(r=3, shadow_alpha=0.5), model=blocks,
        ends=("embed_tokens", "lm_head"),
    ),
}  # fmt: skip
