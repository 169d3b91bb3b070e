"""Where the rows of a prompt start: drawn, or the embeddings of a text, of random tokens or of
labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import POLICY, warn

if TYPE_CHECKING:
    from .tokens import Tokens


def embedded(prompt: Tokens, ids: list[int] | Tensor) -> Tensor:
    """The untouched embeddings of tokens, in fp32.

    Raises:
        ValueError: the model's input has no vocabulary, or it does not have these tokens.
    """
    table: Any = prompt.table
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"prompt_tuning_init={prompt.config.prompt_tuning_init!r} takes rows of a vocabulary, "
            f"and the model's input is a {type(table).__name__}; use 'RANDOM'"
        )
    ids = torch.as_tensor(ids, dtype=torch.long, device="cpu")
    size = table.num_embeddings
    if bool((ids >= size).any()):
        raise ValueError(
            f"token {int(ids.max())} is not in the model's vocabulary of {size} tokens; is the "
            f"tokenizer {getattr(prompt.config, 'tokenizer_name_or_path', None)!r} that of the "
            "model?"
        )
    rows: Tensor = table(ids.to(table.weight.device))
    return rows.float()


def sampled(prompt: Tokens) -> Tensor:
    """Random rows of the vocabulary, each as likely as any other."""
    size = getattr(prompt.table, "num_embeddings", 1)
    return embedded(prompt, torch.randint(0, size, (len(prompt.E),), device="cpu"))


def of_text(prompt: Tokens) -> Tensor:
    """The embeddings of a text, cut or repeated to the length of the prompt."""
    text, n = prompt.config.prompt_tuning_init_text, len(prompt.E)
    ids = tokenizer_of(prompt.config)(text)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text={text!r} has no tokens; give a text")
    return embedded(prompt, (ids * -(-n // len(ids)))[:n])


def of_labels(prompt: Tokens) -> Tensor:
    """A row for each label, the mean of its tokens' embeddings; random rows behind them (section
    3.2 of the paper).
    """
    rows, labels = sampled(prompt), prompt.config.prompt_tuning_init_labels
    if len(labels) > prompt.n:
        raise ValueError(
            f"prompt_tuning_init_labels holds {len(labels)} labels, and there are {prompt.n} "
            f"virtual tokens; give num_virtual_tokens={len(labels)} or more"
        )
    tokenizer = tokenizer_of(prompt.config)
    for i, label in enumerate(labels):
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"the label {label!r} has no tokens; give a text for each label")
        rows[i] = embedded(prompt, ids).mean(0)
    return rows


def tokenizer_of(config: Any) -> Any:
    """The tokenizer that a config names; code that comes with it is never run.

    Raises:
        ValueError: the config asks for that.
    """
    from transformers import AutoTokenizer

    options = dict(config.tokenizer_kwargs or {})
    if options.pop("trust_remote_code", False):
        text = (
            "tokenizer_kwargs asks for trust_remote_code, and a config never runs code; leave it "
            "out, or save the tokenizer as a folder that needs none"
        )
        if not POLICY.lenient:
            raise ValueError(text)
        warn(text)
    return AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)


STARTS: dict[str, Callable[[Tokens], Tensor]] = {
    "TEXT": of_text,
    "SAMPLE_VOCAB": sampled,
    "LABELS": of_labels,
}
