"""The small model of the state machine, and the configs of its adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graftwork as gw

IDS = torch.tensor([[1, 3, 3], [0, 7, 2], [4, 5, 1], [6, 2, 5]])


class Net(nn.Module):
    """An embedding, the mean over the tokens, a gated block whose first two layers share their
    input, a norm, a head; outputs of the last three tokens. ``tied``: the head has the weight of
    the embedding.
    """

    def __init__(self, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.q_proj, self.k_proj = nn.Linear(6, 4), nn.Linear(6, 4)
        self.down_proj = nn.Linear(4, 6, bias=bias)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 8)
        if tied:
            self.head.weight = self.embed.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        there = torch.ones_like(x[..., :1]) if attention_mask is None else attention_mask[..., None]
        x = x + (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        x = x[:, -IDS.shape[1] :]
        x = x + self.down_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


PATHS = ("embed", "q_proj", "k_proj", "down_proj", "norm", "head")
THREE = ["q_proj", "k_proj", "down_proj"]


def kind(config: Callable[..., Any], targets: list[str], **options: Any) -> Callable[[], Any]:
    return lambda: config(target_modules=list(targets), **options)


PROMPT: Any = {"token_dim": 6, "num_layers": 1, "num_attention_heads": 1}
# label -> config; two labels differ in more than values, so neither's file fits the other
ZOO: dict[str, Callable[[], Any]] = {
    "lora": kind(gw.LoraConfig, THREE, r=2, lora_alpha=3),
    "lora_embedding": kind(gw.LoraConfig, ["embed", "q_proj"], r=1, lora_alpha=2),
    "rslora": kind(gw.LoraConfig, ["q_proj", "head"], r=3, lora_alpha=2, use_rslora=True),
    "lora_bias": kind(gw.LoraConfig, ["q_proj", "down_proj"], r=1, lora_bias=True),
    "lora_saving": kind(gw.LoraConfig, ["down_proj"], r=2, modules_to_save=["head"]),
    "lora_saving_norm": kind(gw.LoraConfig, ["q_proj"], r=1, modules_to_save=["norm"]),
    "lora_saving_embedding": kind(gw.LoraConfig, ["head"], r=1, modules_to_save=["embed"]),
    "lora_tokens": kind(gw.LoraConfig, ["k_proj"], r=2, trainable_token_indices=[1, 3]),
    "lora_under_tokens": kind(
        gw.LoraConfig, ["embed", "q_proj"], r=2, trainable_token_indices=[2, 5]
    ),
    "lora_tied": kind(
        gw.LoraConfig, ["embed", "q_proj"], r=2, lora_alpha=3, ensure_weight_tying=True
    ),
    "lora_saving_tied": kind(
        gw.LoraConfig, ["k_proj"], r=1, modules_to_save=["embed"], ensure_weight_tying=True
    ),
    "lora_over_tokens": kind(
        gw.LoraConfig, ["head", "k_proj"], r=1, trainable_token_indices=[1, 6]
    ),
    "lora_biases": kind(gw.LoraConfig, ["k_proj", "head"], r=1, bias="lora_only"),
    "pissa": kind(gw.LoraConfig, ["k_proj", "head"], r=2, init_lora_weights="pissa"),
    "dora": kind(gw.LoraConfig, ["q_proj", "down_proj"], r=2, use_dora=True),
    "dora_embedding": kind(gw.LoraConfig, ["embed", "head"], r=2, use_dora=True),
    "adalora": kind(gw.AdaLoraConfig, THREE, init_r=3, target_r=1, total_step=4, lora_alpha=4),
    "loha": kind(gw.LoHaConfig, THREE, r=2, alpha=3),
    "lokr": kind(gw.LoKrConfig, ["q_proj", "head"], r=1, alpha=2),
    "ia3": kind(gw.IA3Config, ["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3_head": kind(gw.IA3Config, ["q_proj", "head"], feedforward_modules=[]),
    "vera": kind(gw.VeraConfig, THREE, r=2),
    "oft": kind(gw.OFTConfig, THREE, oft_block_size=2, use_cayley_neumann=False),
    "boft": kind(gw.BOFTConfig, ["q_proj", "head"], boft_block_size=2),
    "hra": kind(gw.HRAConfig, ["down_proj", "head"], r=2),
    "fourierft": kind(gw.FourierFTConfig, ["q_proj", "down_proj"], n_frequency=5, scaling=3.0),
    "delora": kind(gw.DeloraConfig, ["k_proj", "down_proj"], r=2, delora_lambda=1.0),
    "miss": kind(gw.MissConfig, THREE, r=2),
    "hira": kind(gw.HiraConfig, ["q_proj", "k_proj"], r=2),
    "road": kind(gw.RoadConfig, ["q_proj", "down_proj"], group_size=2),
    "prompt": lambda: gw.PromptTuningConfig(num_virtual_tokens=2, **PROMPT),
    "prompt_longer": lambda: gw.PromptTuningConfig(num_virtual_tokens=3, **PROMPT),
    "ln_tuning": kind(gw.LNTuningConfig, ["norm"]),
    "tokens": kind(gw.TrainableTokensConfig, ["embed"], token_indices=[0, 3]),
}
METHODS = sorted({config().method for config in ZOO.values()})
