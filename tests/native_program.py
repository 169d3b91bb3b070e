"""transformers' own add_adapter, save_pretrained and load_adapter with every method, for
test_native.py, which runs it in a process of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import graftwork

graftwork.as_peft()

import torch  # noqa: E402

from graftwork.testing.bench import shake  # noqa: E402
from specs import ROWS  # noqa: E402
from tiny import IDS, build  # noqa: E402

folder = Path(sys.argv[1])
report: dict[str, Any] = {}


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    with graftwork.using(model, **call):  # virtual tokens, which have logits too, stand in front
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


for name, entry in ROWS.items():
    if name == "Arrow":  # for what has no tensors of its own transformers writes no file
        continue
    call = {key: value[:2] for key, value in entry.call.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            kind = "gpt2" if name == "BITFIT" else "llama"  # a Llama has no biases
            with torch.no_grad():
                base = build(kind)(input_ids=IDS).logits
            config = entry.at(["q_proj", "down_proj"])
            if not entry.kinds or name in ("TRAINABLE_TOKENS", "BITFIT"):
                config.target_modules = None
            model: Any = build(kind)
            entry.setup.before(model, config, IDS)
            model.add_adapter(config, "one")
            entry.setup.after(model, "one", IDS)
            shake(model)
            want = answer(model.eval())
            model.save_pretrained(folder / name)
            loaded: Any = build(kind)
            entry.setup.before(loaded, config, IDS)
            info = loaded.load_adapter(str(folder / name), "two")
            got = answer(loaded.eval())
            loaded.disable_adapters()
            off = loaded(input_ids=IDS).logits
        report[name] = {
            "effect": float((want - base).abs().max()),
            "loaded": float((got - want).abs().max()),
            "off": float((off - base).abs().max()),
            "keys": sorted(info.missing_keys) + sorted(info.unexpected_keys),
        }
    except Exception:
        report[name] = {"error": traceback.format_exc()[-1500:]}
print(json.dumps(report))
