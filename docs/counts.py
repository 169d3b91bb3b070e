"""Count what each method trains in a Llama-2-7B: ``python docs/counts.py`` writes methods.json."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from graftwork import METHODS
from graftwork.config import PeftConfig

HERE = Path(__file__).parent
LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
BLOCKS = LLAMA_2_7B["num_hidden_layers"]


def count() -> dict[str, dict[str, Any]]:
    """What each method trains in a Llama-2-7B, without its weights; where, and of which model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    told = yaml.safe_load((HERE / "methods.yaml").read_text(encoding="utf-8"))["methods"]
    found: dict[str, dict[str, Any]] = {}
    for name in METHODS:
        facts = told.get(name, {})
        if "uncounted" in facts:
            found[name] = {"why": facts["uncounted"]}
            continue
        blocks, options = facts.get("blocks"), facts.get("count", "")
        small = {"num_hidden_layers": blocks, "vocab_size": 64} if blocks else {}
        with torch.device("cpu" if blocks else "meta"):
            base = LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B | small))
        with tempfile.TemporaryDirectory() as folder:
            names = {"two_loras": _experts(folder, base)} if "two_loras" in options else {}
            config = METHODS[name].config(**eval(f"dict({options})", names))
            found[name] = _attached(base, config, BLOCKS // blocks if blocks else 1)
        found[name]["options"] = options
    return found


def _attached(base: Any, config: PeftConfig, times: int) -> dict[str, Any]:
    """The count of one method, in a part of the model that is there so many times."""
    from graftwork import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    last = [path.rpartition(".")[2] for path in model.base_model.hosts()]
    sites = Counter("blocks" if name.isdigit() else name for name in last)
    at = ", ".join(f"{site} ({n * times})" if n * times > 1 else site for site, n in sites.items())
    return {"trained": model.get_nb_trainable_parameters()[0] * times, "at": at}


def _experts(folder: str, base: Any) -> dict[str, str]:
    """Two LoRAs of zeros, as X-LoRA reads them."""
    import torch
    from safetensors.torch import save_file

    from graftwork import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = get_peft_model(base, LoraConfig())
    zeros = {n: torch.zeros(t.shape) for n, t in get_peft_model_state_dict(model).items()}
    for i in range(2):
        model.peft_config["default"].save_pretrained(f"{folder}/{i}")
        save_file(zeros, f"{folder}/{i}/adapter_model.safetensors")
    model.unload()
    return {str(i): f"{folder}/{i}" for i in range(2)}


if __name__ == "__main__":
    text = json.dumps(count(), indent=1)
    (HERE / "methods.json").write_text(text + "\n", encoding="utf-8")
