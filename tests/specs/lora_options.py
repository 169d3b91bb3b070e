"""The variants of LoRA: KaSA, MiCA, QALoRA, BD-LoRA, VeLoRA, MonteCLoRA, aLoRA. Arrow, which stands
upon other adapters, is in tests/test_lora_options.py.
"""

from collections.abc import Callable
from typing import Any

import torch

from graftwork import LoraConfig
from specs import Case, Parity


def lora(**options: Any) -> Callable[..., Any]:
    return lambda: LoraConfig(**{"r": 2, "lora_alpha": 3, **options})


A_BLOCKS = {"target_modules_bd_a": ["l", "embed"], "nblocks": 2}
B_BLOCKS = {"target_modules_bd_b": ["l"], "nblocks": 2}
NOISE = {"num_samples": 3, "sample_scaler": 0.1, "use_entropy": True}
OFFSETS = {"alora_offsets": torch.tensor([2, 1, 3, 0])}
VELORA = {"num_groups": 3, "scale": 0.5}

CASES: dict[str, Case] = {
    "kasa": Case(lora(kasa_config={}), main=True, row="KaSA", identity=False),
    "mica": Case(lora(init_lora_weights="mica"), main=True, row="MiCA"),
    "qalora": Case(
        lora(use_qalora=True, qalora_group_size=2), main=True, row="QALoRA", lacks="depthwise"
    ),
    "qalora_3": Case(lora(use_qalora=True, qalora_group_size=3), needs="depthwise"),
    "bdlora_a": Case(lora(use_bdlora=A_BLOCKS), main=True, row="BD-LoRA", lacks="depthwise"),
    "bdlora_b": Case(lora(use_bdlora=B_BLOCKS)),
    "velora": Case(lora(velora_config=VELORA), main=True, row="VeLoRA"),
    "velora_random": Case(lora(velora_config={**VELORA, "init_type": "random"})),
    "monteclora": Case(lora(monteclora_config=NOISE), main=True, row="MonteCLoRA"),
    "alora": Case(
        lora(alora_invocation_tokens=[5, 6]), main=True, row="aLoRA", call=OFFSETS, lacks="fold",
        but="conv1d conv2d conv2d_groups conv2d_depthwise conv3d",  # positions are mixed there
    ),
}  # fmt: skip

QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
ALL = {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]}
GPT2 = {"r": 4, "target_modules": ["c_attn", "c_proj"]}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
BLOCKS = {
    "target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2
}  # fmt: skip
FREE = {"beta": 0.0, "gamma": 0.0}  # in PEFT the penalties come from the user's loop
SILENT = {"num_samples": 3, "sample_scaler": 0.0, "kl_loss_weight": 0.0}


def parity(model: str, name: str, options: dict[str, Any], **rest: Any) -> Parity:
    return Parity(model, "LoraConfig", options, name, **rest)


PARITY = [
    parity("plain", "kasa", {**PLAIN, "kasa_config": {}}),
    parity("llama", "kasa", {**ALL, "kasa_config": FREE}, train=True),
    parity("llama", "kasa_bias", {**QV, "kasa_config": {}, "lora_bias": True, "use_rslora": True}),
    parity("plain", "mica",
           {"r": 4, "target_modules": ["lin0", "lin1", "emb"], "init_lora_weights": "mica"}),
    parity("llama", "mica", {**ALL, "init_lora_weights": "mica"}, train=True),
    parity("gpt2", "mica", {**GPT2, "init_lora_weights": "mica"}),
    parity("plain", "bdlora",
           {**PLAIN, "use_bdlora": {"target_modules_bd_a": ["lin0"], "nblocks": 4,
                                    "match_strict": False}}),
    parity("llama", "bdlora", {**ALL, "use_bdlora": BLOCKS}, train=True),
    parity("plain", "velora", {**PLAIN, "velora_config": {"num_groups": 5}}),
    *(parity("llama", f"velora_{how}", {**QV, "velora_config": {
        "num_groups": 6, "scale": 0.7, "init_type": how}}, train=True)
      for how in ("batch_average", "batch_average_once", "random")),
    parity("gpt2", "velora", {**GPT2, "velora_config": {}}),
    parity("plain", "monteclora", {**PLAIN, "monteclora_config": {}}),
    parity("llama", "monteclora", {**QV, "monteclora_config": SILENT}, train=True),
    parity("gpt2", "monteclora", {**GPT2, "monteclora_config": {"num_samples": 4}}),
    parity("llama", "replicated", {**ALL, "layer_replication": [[0, 2], [1, 2]]}, train=True),
    parity("bert", "replicated",
           {"r": 4, "target_modules": ["query", "value"], "layer_replication": [[1, 2], [0, 2]]}),
    parity("llama", "alora",
           {**ALL, "alora_invocation_tokens": [32], "task_type": "CAUSAL_LM"}, train=True),
]  # fmt: skip
