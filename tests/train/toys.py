"""Tiny random models with tokenizers of a few words, and data that they can learn in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOOD = "good fine great lovely happy".split()
BAD = "bad awful poor dull sad".split()
PLAIN = "the a film plot actor scene was is and very".split()
EXTRA = "### Instruction: Response: say it loud one two three ( ) , . : #".split()


def tokenizer(kind: str) -> Any:
    """A tokenizer of whole words; ``bert`` puts marks around a text, ``llama`` one in front."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if kind == "bert" else ["<unk>", "<s>", "</s>"]
    words = dict.fromkeys([*special, *GOOD, *BAD, *PLAIN, *EXTRA])
    unknown = special[1] if kind == "bert" else special[0]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        named = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
        }
    else:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=32 if kind == "bert" else 64,
        model_input_names=["input_ids", "attention_mask", *["token_type_ids"] * (kind == "bert")],
        **named,
    )


def bert(folder: Path, **changes: Any) -> Path:
    """A BERT of two layers, without a head."""
    words = tokenizer("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{
            "vocab_size": len(words),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.2,  # random features rich enough to learn from
            **changes,
        }
    )
    return _saved(transformers.BertModel(config), words, folder)


def llama(folder: Path) -> Path:
    """A Llama of two layers."""
    words = tokenizer("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return _saved(transformers.LlamaForCausalLM(config), words, folder)


def _saved(model: Any, words: Any, folder: Path) -> Path:
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences whose adjective decides their label."""
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        label = draw.choice(["good", "bad"])
        words = [*draw.sample(PLAIN, 3), draw.choice(GOOD if label == "good" else BAD)]
        draw.shuffle(words)
        out.append((" ".join(words), label))
    return out


def write_table(path: Path, rows: list[tuple[str, ...]], heading: tuple[str, ...]) -> Path:
    """A csv, tsv or jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(heading, row, strict=True))) for row in rows]
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(row) for row in [heading, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def answers(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts and their answers: the same words, aloud."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = draw.sample(GOOD, 2)
        pairs.append(("say " + " ".join(words), " ".join(reversed(words))))
    return pairs
