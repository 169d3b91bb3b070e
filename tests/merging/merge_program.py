"""Merges in a process of its own: "merge BASE ADAPTER OUT", to be killed; "large FOLDER", which
tells the bytes of a base model, its largest file and the adapter, and the peak of the memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

from graftwork import LoraConfig, get_peft_model
from graftwork.merging import merge_files
from graftwork.merging.shards import INDEX, Piece, Shard, write

CAUSAL = transformers.AutoModelForCausalLM


def merge(of: str, where: str, out: str) -> None:
    config = transformers.AutoConfig.from_pretrained(of)
    print("ready", flush=True)
    merge_files(of, where, out, CAUSAL, config, overwrite=True)


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers that are made fast."""
    count = torch.Size(shape).numel()
    row = torch.randn(4099, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16) / 50
    return row.repeat(-(-count // 4099))[:count].view(shape)


def memory(name: str) -> int:
    """Bytes of this process now (VmRSS), or at most (VmHWM)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) * 1024


def large(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=5504, num_hidden_layers=22,
        num_attention_heads=16, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    of, weights, files = folder / "base", {}, 5
    of.mkdir()
    config.save_pretrained(of)
    every = list(model.state_dict().items())
    for i in range(files):
        own = every[i * len(every) // files : (i + 1) * len(every) // files]
        pieces = [
            Piece(name, "BF16", tuple(t.shape), value=lambda t=t, k=k: values(tuple(t.shape), k))
            for k, (name, t) in enumerate(own)
        ]
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        write(of / name, pieces, {"format": "pt"})
        weights |= {key: name for key, _ in own}
    (of / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    state = adapted.state_dict()
    del adapted, model
    with torch.device("meta"):
        again = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    adapted = get_peft_model(again, LoraConfig(r=8, target_modules="all-linear"))
    parts = {n: torch.randn(p.shape) / 50 for n, p in adapted.named_parameters() if p.requires_grad}
    assert parts.keys() <= state.keys()
    adapted.save_pretrained(folder / "adapter", state_dict={**adapted.state_dict(), **parts})
    del adapted, again, state
    held = sum(t.numel() * 4 for t in parts.values())
    parts.clear()
    loaded = transformers.AutoConfig.from_pretrained(of)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    merge_files(of, folder / "adapter", folder / "out", CAUSAL, loaded)
    peak = memory("VmHWM") - before
    check(of, folder)
    sizes = [path.stat().st_size for path in of.glob("*.safetensors")]
    print(sum(sizes), max(sizes), held, peak)


def check(of: Path, folder: Path) -> None:
    """Some weights, against W + s B A in fp32, rounded once."""
    adapter = Shard(folder / "adapter" / "adapter_model.safetensors")
    weights = json.loads((of / INDEX).read_text())["weight_map"]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.21.mlp.down_proj"):
        a, b = (adapter.view(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        key = f"{name}.weight"
        old, new = (Shard(at / weights[key]).view(key) for at in (of, folder / "out"))
        assert torch.equal((old.float() + b @ a).to(torch.bfloat16), new), name


if __name__ == "__main__":
    if sys.argv[1] == "merge":
        merge(*sys.argv[2:])
    else:
        large(Path(sys.argv[2]))
