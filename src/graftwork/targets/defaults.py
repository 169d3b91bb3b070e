"""The layers that PEFT 0.21 adapts where a config does not say, by ``config.model_type``."""

from __future__ import annotations

from typing import Any

_GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"
_QV = ["q_proj", "v_proj"]
_QKV = ["query_key_value"]

LORA: dict[str, list[str] | str] = {
    **dict.fromkeys(["t5", "mt5"], ["q", "v"]),
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["c_attn"]),
    **dict.fromkeys(
        ["bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"], _QKV
    ),
    **dict.fromkeys(
        ["bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"], _QV
    ),
    **dict.fromkeys(["gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], _QV),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "layoutlm"], ["query", "value"]),
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "mpt": ["Wqkv"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma4": _GEMMA4,
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}

ADALORA: dict[str, list[str] | str] = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    **dict.fromkeys(["bart", "opt"], ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["c_attn"]),
    **dict.fromkeys(["bloom", "gpt_neox"], _QKV),
    **dict.fromkeys(
        ["gptj", "gpt_neo", "llama", "llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"],
        _QV,
    ),
    "bert": ["query", "value"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "deberta": ["in_proj"],
    "gemma4": _GEMMA4,
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

IA3: dict[str, list[str] | str] = {
    "t5": ["k", "v", "wo"],
    "mt5": ["k", "v", "wi_1"],
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["c_attn", "mlp.c_proj"]),
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    **dict.fromkeys(
        ["gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"],
        ["query_key_value", "dense_4h_to_h"],
    ),
    **dict.fromkeys(["bert", "roberta"], ["key", "value", "output.dense"]),
    "opt": ["q_proj", "k_proj", "fc2"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "gpt_neo": ["q_proj", "v_proj", "c_proj"],
    **dict.fromkeys(["bart", "phi"], ["q_proj", "v_proj", "fc2"]),
    **dict.fromkeys(["llama", "mistral"], ["k_proj", "v_proj", "down_proj"]),
    **dict.fromkeys(
        ["llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], [*_QV, "down_proj"]
    ),
    "mixtral": ["k_proj", "v_proj", "w2"],
    "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "deberta": ["in_proj", "output.dense"],
}

IA3_FEEDFORWARD: dict[str, list[str]] = {
    "t5": ["wo"],
    "mt5": [],
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["mlp.c_proj"]),
    "bloom": ["mlp.dense_4h_to_h"],
    **dict.fromkeys(["gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"], ["dense_4h_to_h"]),
    **dict.fromkeys(["bert", "roberta", "deberta-v2", "deberta"], ["output.dense"]),
    **dict.fromkeys(["opt", "bart", "phi"], ["fc2"]),
    "gptj": ["fc_out"],
    "gpt_neo": ["c_proj"],
    **dict.fromkeys(
        ["llama", "llama4", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"],
        ["down_proj"],
    ),
    "mixtral": ["w2"],
}

PHI_QV = {**LORA, "phi": _QV}
C_PROJ = {**LORA, **dict.fromkeys(["gpt2", "gpt_bigcode"], ["mlp.c_proj"])}
VBLORA = {**ADALORA, "roberta": ["query", "value"]}
ADAMSS = {**LORA, "vit": ["query", "value"]}
FROD = {**PHI_QV, "vit": ["query", "value"]}

_NORMS = ["input_layernorm", "post_attention_layernorm"]
_NORMS4 = [*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"]
LN_TUNING: dict[str, list[str] | str] = {
    **dict.fromkeys(["llama", "mistral", "gemma"], [*_NORMS, "norm"]),
    **dict.fromkeys(["gemma2", "gemma3_text"], _NORMS4),
    **dict.fromkeys(["bloom", "falcon"], [*_NORMS, "ln_f"]),
    "llava": ["multi_modal_projector", *_NORMS, "norm", "embed_tokens", "lm_head"],
    **dict.fromkeys(["t5", "mt5"], ["layer_norm", "final_layer_norm"]),
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "gptj": ["ln_1", "ln_f"],
    "phi": ["input_layernorm", "final_layernorm"],
    **dict.fromkeys(["qwen2", "qwen3"], ["post_attention_layernorm"]),
}

BEFT: dict[str, list[str] | str] = {
    **dict.fromkeys(["t5", "mt5"], ["v"]),
    **dict.fromkeys(["roberta", "bert"], ["value"]),
    "deberta-v2": ["value_proj"],
    **dict.fromkeys(
        "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 "
        "qwen3".split(),
        ["v_proj"],
    ),
}

_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
OSF: dict[str, list[str] | str] = {
    **dict.fromkeys(
        "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi".split(), _SEVEN
    ),
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["c_attn", "c_proj"]),
    **dict.fromkeys(["bloom", "gpt_neox", "falcon"], ["query_key_value", "dense_4h_to_h"]),
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
}

# where bottleneck adapters go, as ends of paths: behind attention, behind the feed-forward part
BOTTLENECK: dict[str, list[str] | str] = {
    **dict.fromkeys(
        "bert roberta xlm-roberta electra layoutlm deberta deberta-v2".split(),
        [r"attention\.output\.dense", r"\d+\.output\.dense"],
    ),
    "distilbert": ["out_lin", r"ffn\.lin2"],
    **dict.fromkeys(["gpt2", "gpt_bigcode"], [r"attn\.c_proj", r"mlp\.c_proj"]),
    **dict.fromkeys(["t5", "mt5"], ["o", "wo"]),
    **dict.fromkeys(["bart", "opt"], ["out_proj", "fc2"]),
    **dict.fromkeys(
        "llama mistral gemma gemma2 gemma3_text qwen2 qwen3".split(), ["o_proj", "down_proj"]
    ),
    "vit": ["o_proj", "fc2"],
}

_LIKE_LORA = (
    "LORA BOFT DEFT DELORA GLORA GRALORA HIRA HRA LILY LOHA LOKR MISS OFT PEANUT POLY PSOFT "
    "RANDLORA ROAD SUPERTUNING TINYLORA UNILORA"
)
TARGETS: dict[str, dict[str, Any]] = {  # method -> what it adapts in which architecture
    **dict.fromkeys(_LIKE_LORA.split(), LORA),
    **dict.fromkeys(["C3A", "FOURIERFT", "WAVEFT"], C_PROJ),
    **dict.fromkeys(["SHIRA", "VERA"], PHI_QV),
    "ADALORA": ADALORA,
    "ADAMSS": ADAMSS,
    "BEFT": BEFT,
    "BOTTLENECK": BOTTLENECK,
    "FROD": FROD,
    "IA3": IA3,
    "LN_TUNING": LN_TUNING,
    "OSF": OSF,
    "PVERA": {**PHI_QV, "dinov2": ["query", "value"]},
    "VBLORA": VBLORA,
}
