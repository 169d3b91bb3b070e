"""How long it takes to put LoRA into a model: Llama-2-7B's shape on the meta device.

    python benchmarks/inject.py

r=16 on q, k and v; the median of five, with the real peft beside it where that is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def seconds(library: Any) -> float:
    """One injection."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    began = time.perf_counter()
    lora = library.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"])
    model = library.get_peft_model(base, lora)
    took = time.perf_counter() - began
    assert model.get_nb_trainable_parameters() == (12_582_912, 6_750_998_528)
    return took


def main() -> None:
    """Print the medians and their ratio."""
    warnings.simplefilter("ignore")
    names = ["graftwork", *(["peft"] if importlib.util.find_spec("peft") else [])]
    libraries = {name: importlib.import_module(name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(5):
        for name, library in libraries.items():
            times[name].append(seconds(library))
    for name in names:
        print(f"{name:<10} {median(times[name]):.3f} s")
    if len(names) == 2:
        print(f"ratio      {median(times['peft']) / median(times['graftwork']):.1f}")


if __name__ == "__main__":
    main()
