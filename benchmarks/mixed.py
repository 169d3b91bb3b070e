"""What a batch of rows with an adapter each costs, as a ratio to the base model's own forward.

    python benchmarks/mixed.py

Medians of nine, interleaved with the base model's forward and, where it is installed, with the real
peft's mixed batch. Llama-shaped models, adapters on all linear layers: 16 rows with 16 adapters of
rank 8 (width 256, 32 layers, 16 and 64 tokens a row), and one token for each of 64 rows with 64
adapters of ranks 4 to 64 (width 2048, 2 layers). On a GPU: the same in bf16.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

REPEATS, WARM = 9, 2


@dataclass
class Shape:
    """One row of the table."""

    name: str
    width: int
    layers: int
    mlp: int
    heads: int
    ranks: list[int]
    tokens: int
    bound: float

    def build(self, library: Any) -> Any:
        """The model with one adapter for each row of the batch, frozen."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=self.width, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.heads, max_position_embeddings=512,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        if torch.cuda.is_available():
            model = model.to("cuda", torch.bfloat16)
        for i, r in enumerate(self.ranks):
            lora = library.LoraConfig(
                r=r, target_modules="all-linear", init_lora_weights=False, inference_mode=True
            )
            if i:
                model.add_adapter(f"a{i}", lora)
            else:
                model = library.get_peft_model(model, lora, "a0")
        return model.eval()


SHAPES = [
    Shape("forward, 16 rows, 16 adapters, 16 tokens", 256, 32, 688, 8, [8] * 16, 16, 1.6),
    Shape("forward, 16 rows, 16 adapters, 64 tokens", 256, 32, 688, 8, [8] * 16, 64, 1.6),
    Shape(
        "decode, 64 rows, 64 adapters of ranks 4 to 64", 2048, 2, 5504, 16,
        [4 + 60 * i // 63 for i in range(64)], 1, 1.25,
    ),
]  # fmt: skip


def seconds(run: Callable[[], Any]) -> float:
    """One call."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def ratio(model: Any, ids: torch.Tensor, names: list[str], base: Callable[[], Any]) -> float:
    """The median over pairs of a mixed batch's time to the base's."""
    pairs = []
    for _ in range(REPEATS + WARM):
        alone = seconds(base)
        mixed = seconds(lambda: model(input_ids=ids, adapter_names=names))
        pairs.append(mixed / alone)
    return median(pairs[WARM:])


def measure(shape: Shape, library: Any) -> float:
    """The ratio for one library."""
    model = shape.build(library)
    plain = LlamaForCausalLM(model.config).eval().to(model.device, model.dtype)
    ids = torch.randint(0, 4096, (len(shape.ranks), shape.tokens), device=model.device)
    names = [f"a{i}" for i in range(len(shape.ranks))]
    gc.collect()  # of the model before
    return ratio(model, ids, names, lambda: plain(input_ids=ids))


def recompilations(library: Any) -> float:
    """How often a compiled model is compiled again over 20 loads, switches and rescalings, once it
    has met each of its two adapters.
    """
    where = "peft.helpers" if library.__name__ == "peft" else "graftwork.interop.helpers"
    helpers = importlib.import_module(where)
    torch.manual_seed(0)
    torch._dynamo.reset()

    def lora() -> Any:
        return library.LoraConfig(r=8, target_modules=["0", "1"])

    base = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    model = library.get_peft_model(base, lora(), "a").eval()
    model.add_adapter("b", lora())
    counter = CompileCounter()
    compiled: Any = torch.compile(model, backend=counter, dynamic=False)
    x = torch.randn(4, 32)
    with torch.no_grad():
        for name in "ab":
            model.set_adapter(name)
            compiled(x)
        before = counter.frame_count
        for i in range(20):
            model.add_adapter(f"n{i}", lora())
            model.set_adapter("ab"[i % 2])
            compiled(x)
            with helpers.rescale_adapter_scale(model, 0.5 + i):
                compiled(x)
    return float(counter.frame_count - before)


def rows() -> list[dict[str, Any]]:
    """The table: name, peft (None where it is not installed), ours, unit, bound."""
    warnings.simplefilter("ignore")
    ours = importlib.import_module("graftwork")
    peft = importlib.import_module("peft") if importlib.util.find_spec("peft") else None
    return [
        {
            "name": shape.name,
            "peft": None if peft is None else measure(shape, peft),
            "ours": measure(shape, ours),
            "unit": "x base forward",
            "bound": shape.bound,
        }
        for shape in SHAPES
    ] + [
        {
            "name": "recompilations over 20 loads, switches and rescalings",
            "peft": None if peft is None else recompilations(peft),
            "ours": recompilations(ours),
            "unit": "",
            "bound": 0.0,
        }
    ]


def main() -> None:
    """Print the table, and as JSON where a path is given."""
    found = rows()
    for row in found:
        peft = "-" if row["peft"] is None else f"{row['peft']:.2f}"
        print(f"{row['name']:<50} peft {peft:>6}   ours {row['ours']:.2f}   bound {row['bound']}")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
