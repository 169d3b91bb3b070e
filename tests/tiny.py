"""Tiny models of many kinds, always with the same weights, and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Convolutions, an embedding and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 16)
        self.lin0, self.lin1 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.conv1 = nn.Conv1d(16, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, (3, 3), stride=2, padding=1)
        self.conv3 = nn.Conv3d(2, 4, (2, 3, 3))
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.lin1(self.lin0(self.emb(ids)).relu()))  # (batch, time, 16)
        y = self.conv1(x.mT)  # (batch, 8, time)
        z = self.conv2(y[..., None].expand(-1, -1, -1, 6))  # (batch, 6, ., .)
        w = self.conv3(x.reshape(len(x), 2, 4, 4, -1)).flatten(1)
        return torch.cat([self.head(x).flatten(1), z.flatten(1), w], dim=1)


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **options,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=3,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            num_labels=3,
        )
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


class Attention(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lin = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.mha(x, x, x)[0])


_g = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 64, (2, 8), generator=_g)
PIXELS = torch.randn(2, 3, 16, 16, generator=_g)
SMALL = torch.randint(0, 10, (2, 8), generator=_g)
FEATURES = torch.randn(2, 5, 16, generator=_g)

# name -> how to build the model, and its input
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "plain": (Plain, {"ids": SMALL}),
    "attention": (Attention, {"x": FEATURES}),
    "llama": (llama, {"input_ids": IDS}),
    "llama_tied": (lambda: llama(tie_word_embeddings=True), {"input_ids": IDS}),
    "gpt2": (gpt2, {"input_ids": IDS}),
    "bert": (bert, {"input_ids": IDS}),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}),
    "vit": (vit, {"pixel_values": PIXELS}),
    "mixtral": (mixtral, {"input_ids": IDS}),
}


def build(name: str) -> nn.Module:
    """The model ``name``, every time with the same weights, none of which is zero or one."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        seen = set()
        for p in model.parameters():
            if p.data_ptr() not in seen:
                seen.add(p.data_ptr())
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def run(model: nn.Module, name: str) -> Tensor:
    """The model's output for its input."""
    out = model(**MODELS[name][1])
    return out if isinstance(out, Tensor) else out.logits


def enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Switch gradient checkpointing on, under the name that this transformers has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)
    state = "activation" if new else "gradient"
    assert getattr(model, f"is_{state}_checkpointing")
