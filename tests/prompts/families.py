"""A tiny model of every family, always with the same weights, and inputs for it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, "max_position_embeddings": 128, "pad_token_id": 0}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, **IDS, "num_key_value_heads": 2}
STACKS = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    **IDS,
}
PICTURE = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 16}
GEMMA_N = {
    **GROUPED,
    "num_hidden_layers": 6,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}


@dataclass(frozen=True)
class Family:
    """A model class, its config class and fields, and what the model is.

    Args:
        model: the model's class.
        config: its config's class.
        fields: the config's fields.
        kind: "decoder", "encoder", "both", "picture" or "sound".
    """

    model: str
    config: str
    fields: dict[str, Any]
    kind: str

    @property
    def task(self) -> str | None:
        return {"decoder": "CAUSAL_LM", "both": "SEQ_2_SEQ_LM"}.get(self.kind)

    def build(self, **options: Any) -> nn.Module:
        """The model, in eval mode and without dropout; skips where transformers has none."""
        import transformers

        if not hasattr(transformers, self.config):
            pytest.skip(f"transformers {transformers.__version__} has no {self.config}")
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # older ones script on import
            cls = getattr(transformers, self.model)
        config = getattr(transformers, self.config)(**self.fields)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        model: nn.Module = cls._from_config(config, **options)
        with torch.no_grad():  # biases and norms too, so that nothing is at its neutral value
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        return model.eval()


FAMILIES = {
    "bert": Family("BertModel", "BertConfig", TEXT, "encoder"),
    "roberta": Family("RobertaModel", "RobertaConfig", TEXT, "encoder"),
    "deberta": Family(
        "DebertaModel",
        "DebertaConfig",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "encoder",
    ),
    "deberta_v2": Family(
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
        },
        "encoder",
    ),
    "modernbert": Family(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **TEXT,
            **IDS,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 4,
            "num_hidden_layers": 4,
            "reference_compile": False,
        },
        "encoder",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **IDS},
        "decoder",
    ),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED, "decoder"),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 6}, "decoder"
    ),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", GROUPED, "decoder"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, "decoder"),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}, "decoder"),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        "decoder",
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "decoder",
    ),
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {**GEMMA_N, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None},
        "decoder",
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM", "Gemma4TextConfig", {**GEMMA_N, "global_head_dim": 16}, "decoder"
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 4,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        "both",
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **STACKS,
            "max_position_embeddings": 128,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "forced_eos_token_id": None,
        },
        "both",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**STACKS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 128},
        "sound",
    ),
    "wav2vec2": Family(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {
            **{k: v for k, v in SIZES.items() if k != "vocab_size"},
            "conv_dim": (16, 16),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
        },
        "sound",
    ),
    "vit": Family("ViTModel", "ViTConfig", {**PICTURE, "patch_size": 8}, "picture"),
    "clip_vision": Family(
        "CLIPVisionModel", "CLIPVisionConfig", {**PICTURE, "patch_size": 8}, "picture"
    ),
    "clip_text": Family("CLIPTextModel", "CLIPTextConfig", {**TEXT, **IDS}, "encoder"),
}
TOKENS = [
    name for name, family in FAMILIES.items() if family.kind in ("encoder", "decoder", "both")
]
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
WRITERS = [name for name, family in FAMILIES.items() if family.kind in ("decoder", "both")]


def inputs(name: str, rows: int = 4, length: int = 9) -> dict[str, Tensor]:
    """An input of a family, without padding."""
    g = torch.Generator().manual_seed(1)

    def ids(n: int) -> Tensor:
        return torch.randint(3, VOCAB - 1, (rows, n), generator=g)

    if name == "whisper":
        features = torch.randn(rows, 8, 32, generator=g)
        return {"input_features": features, "decoder_input_ids": ids(length)}
    if name == "wav2vec2":
        return {"input_values": torch.randn(rows, 400, generator=g)}
    if FAMILIES[name].kind == "picture":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=g)}
    found = {"input_ids": ids(length)}
    if FAMILIES[name].kind == "both":
        found["decoder_input_ids"] = ids(6)
    return found


def result(output: Any) -> Tensor:
    """The logits of an output, or its hidden states."""
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found
