"""Methods whose virtual tokens are embeddings, the models that they are tried with, and batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .families import FAMILIES, VOCAB, Family


@dataclass(frozen=True)
class Method:
    """A config class by name, its fields, and arguments of every call with two rows."""

    kind: str
    options: dict[str, Any]
    call: dict[str, Tensor] = field(default_factory=dict)
    causal: bool = False  # only for causal language models


FIVE = {"num_virtual_tokens": 5}
EXAMPLES = {
    "cpt_token_ids": [9, 8, 7, 40, 11, 12, 13, 41],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "opt_projection_epsilon": 3.0,
}
TASKS = {"task_ids": torch.tensor([2, 0])}
METHODS = {
    "prompt": Method("PromptTuningConfig", FIVE),
    "sampled": Method("PromptTuningConfig", {**FIVE, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": Method("PromptEncoderConfig", {**FIVE, "encoder_hidden_size": 12}),
    "lstm": Method(
        "PromptEncoderConfig",
        {**FIVE, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.2},
    ),
    "tasks": Method("MultitaskPromptTuningConfig", {**FIVE, "num_tasks": 3, "num_ranks": 2}, TASKS),
    "cpt": Method("CPTConfig", EXAMPLES, causal=True),
    "cpt_decay": Method(
        "CPTConfig",
        {**EXAMPLES, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5},
        {"input_type_mask": torch.tensor([[1, 2, 2, 3, 4, 4, 4], [1, 2, 3, 4, 4, 0, 0]])},
        causal=True,
    ),
}
HEADS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# family, task
PLACES = [
    ("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM"),
]  # fmt: skip


def build(name: str, task: str) -> nn.Module:
    """A tiny model of a family with the head of a task."""
    family = FAMILIES[name]
    if task in HEADS:
        stem = family.config.removesuffix("Config")
        options = {**family.fields, "pad_token_id": 0}
        options |= {} if task == "QUESTION_ANS" else {"num_labels": 3}
        family = Family(stem + HEADS[task], family.config, options, family.kind)
    return family.build()


def batch(task: str, padded: bool = True) -> dict[str, Tensor]:
    """Two rows of seven tokens, the second with padding on the right; labels where PEFT takes
    them.
    """
    g = torch.Generator().manual_seed(2)
    ids, mask = torch.randint(3, VOCAB, (2, 7), generator=g), torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[1, 5:], ids[1, 5:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if task == "CAUSAL_LM":
        found["labels"] = ids.masked_fill(mask == 0, -100)
    if task == "SEQ_2_SEQ_LM":
        found["labels"] = torch.randint(3, VOCAB, (2, 4), generator=g)
    if task == "SEQ_CLS":
        found["labels"] = torch.tensor([2, 0])
    return found


def real(output: Any, mask: Tensor) -> Tensor:
    """The logits of an output; without those of padding, where they are of the input's tokens."""
    logits: Tensor = output["start_logits" if "start_logits" in output else "logits"]
    more = logits.shape[1] - mask.shape[1]
    if logits.ndim == 2 + ("start_logits" not in output) and more >= 0 and logits.shape[1] > 6:
        return logits[torch.cat([mask.new_ones(2, more), mask], dim=1).bool()]
    return logits
