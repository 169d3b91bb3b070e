"""transformers' own add_adapter, save_pretrained and load_adapter with adapters under nasty names,
for test_names_elsewhere.py, which runs it in a process of its own.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import graftwork

graftwork.as_peft()

import torch  # noqa: E402
from nasty import ADAPTERS  # noqa: E402

from graftwork import IA3Config, LoraConfig  # noqa: E402
from graftwork.testing.bench import shake  # noqa: E402
from tiny import IDS, build  # noqa: E402

folder = Path(sys.argv[1])
report: dict[str, Any] = {}


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


NAMES = ADAPTERS[:: int(sys.argv[2])]
for i, name in enumerate(NAMES):
    other = NAMES[i - 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = build("llama")
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), other)
        model.add_adapter(lora, name)
        model.set_adapter(name)
        shake(model)
        want = answer(model.eval())
        model.save_pretrained(folder / str(i))
        loaded: Any = build("llama")
        info = loaded.load_adapter(str(folder / str(i)), name)
        got = answer(loaded.eval())
        loaded.delete_adapter(name)
    report[name] = {
        "loaded": float((got - want).abs().max()),
        "keys": sorted([*info.missing_keys, *info.unexpected_keys]),
        "left": [n for n, _ in loaded.named_parameters() if "lora_" in n],
    }
print(json.dumps(report))
