"""The kernel of the attention on this machine: a training step with LoRA, by length.

    python benchmarks/attention.py

Each line is a batch of 2,048 tokens, bf16, MiniLM; the figures are milliseconds, interleaved, the
best of five. It is why `graft train --attention auto` takes plain attention for short sequences
on a CPU.
"""

from __future__ import annotations

import time

import torch
import transformers

from graftwork import LoraConfig, get_peft_model
from graftwork.train.base import autocast
from graftwork.train.demo import model_folder

TOKENS = 2048
KERNELS, DROPOUT = ("eager", "sdpa"), (0.0, 0.1)


def build(kernel: str, dropout: float) -> torch.nn.Module:
    """MiniLM with LoRA on all linear layers."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_folder(), num_labels=60, attn_implementation=kernel, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    config = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    return get_peft_model(base, config).train()


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    with autocast("bf16", torch.device("cpu")):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = {(k, d): build(k, d) for k in KERNELS for d in DROPOUT}
    print(f"{'length':>6}" + "".join(f"{f'{k}, dropout {d:g}':>20}" for k, d in models))
    for length in (16, 32, 64, 128, 256, 512):
        shape = (TOKENS // length, length)
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, -2:] = 0
        ids, labels = torch.randint(1000, 20000, shape), torch.zeros(shape[0], dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        best = dict.fromkeys(models, float("inf"))
        for _ in range(5):
            for name, model in models.items():
                best[name] = min(best[name], step(model, batch))
        print(f"{length:>6}" + "".join(f"{1e3 * seconds:>20.0f}" for seconds in best.values()))


if __name__ == "__main__":
    main()
