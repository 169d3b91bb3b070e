"""A model merged into shards, for kill_program.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from graftwork import LoraConfig, get_peft_model
from graftwork.merging import merge_files
from graftwork.testing.bench import shake
from tiny import build

CAUSAL = transformers.AutoModelForCausalLM


def prepare(where: Path) -> tuple[Path, list[Path]]:
    """A base model in shards, and two adapters of it."""
    of, adapters = where / "base", [where / "first", where / "second"]
    build("llama").save_pretrained(of, max_shard_size="30KB")
    for i, adapter in enumerate(adapters):
        model = get_peft_model(
            CAUSAL.from_pretrained(of), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        )
        shake(model, seed=i)
        model.save_pretrained(adapter)
    return of, adapters


def merge(of: Path, adapter: Path, out: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(of)
    merge_files(of, adapter, out, CAUSAL, config, overwrite=True)


def read(out: Path) -> str:
    """What plain transformers would find there."""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    seen: list[Any] = [json.loads((out / "config.json").read_text())["model_type"]]
    for name, shard in sorted(index.items()):
        with safe_open(out / shard, framework="pt") as file:
            seen.append((name, file.get_tensor(name).numpy().tobytes()))
    return hashlib.sha256(repr(seen).encode()).hexdigest()
