"""Prompts and answers as tokens: the template around a prompt, and which tokens are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .examples import Dialogue, Turn
from .recipe import RecipeError
from .samples import IGNORED

CHAT = "chat"  # the template that the tokenizer brings along
HEADED = "### Instruction:\n{prompt}\n\n### Response:\n"
TEMPLATES = {  # layout -> the text around a prompt where the tokenizer has no template
    "instruction + output": HEADED,
    "messages": HEADED,
    "prompt + completion": "{prompt}\n",
    "query + response": "{prompt}\n",
    "question + answer": "{prompt}\n",
}


def choose(wanted: str | None, layout: str, tokenizer: Any) -> str:
    """The template: the user's, the tokenizer's for conversations, or a plain one."""
    if wanted is not None:
        return wanted.replace("\\n", "\n")
    if layout in ("messages", "instruction + output") and tokenizer.chat_template:
        return CHAT
    return TEMPLATES[layout]


def start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    first = tokenizer("")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def end(tokenizer: Any) -> list[int]:
    """What ends an answer."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encode(dialogue: Dialogue, template: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels (length,) of a dialogue; the labels of what is not learnt are ignored.

    Args:
        dialogue: its turns.
        template: the text around a prompt, or ``CHAT``.
        tokenizer: the base model's.
    """
    ids: list[int] = [] if template == CHAT else start(tokenizer)
    labels = [IGNORED] * len(ids)
    segments = _chat if template == CHAT else _plain
    for text, learnt in segments(dialogue, template, tokenizer):
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        if learnt and template != CHAT:
            new = [*new, *end(tokenizer)]
        ids += new
        labels += new if learnt else [IGNORED] * len(new)
    if all(label == IGNORED for label in labels):
        raise RecipeError(
            "the tokenizer's chat template does not show where an answer begins, so nothing would "
            "be learnt; give a plain one: --template '" + HEADED.replace("\n", "\\n") + "'"
        )
    return np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32)


def question(prompt: str, template: str, tokenizer: Any) -> np.ndarray:
    """The tokens (length,) after which the model is to write its answer."""
    if template == CHAT:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    text = _around(prompt, template) if template else prompt
    ids = [*start(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return np.asarray(ids, dtype=np.int32)


def fit(ids: np.ndarray, labels: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a sample to ``limit`` tokens such that something to learn remains.

    What stands before the first learnt token is cut at its start, to half of the limit if need be;
    the rest is cut at its end.
    """
    surplus = len(ids) - limit
    if surplus <= 0:
        return ids, labels
    prompt = int(np.argmax(labels != IGNORED))
    drop = min(surplus, max(0, prompt - limit // 2))
    return ids[drop : drop + limit], labels[drop : drop + limit]


def _around(prompt: str, template: str) -> str:
    return template.replace("{prompt}", prompt)


def _plain(dialogue: Sequence[Turn], template: str, tokenizer: Any) -> list[tuple[str, bool]]:
    out = []
    for turn in dialogue:
        if turn.role == "assistant":
            out.append((turn.content, True))
        elif turn.role == "user":
            out.append((_around(turn.content, template), False))
        else:
            out.append((f"{turn.content}\n\n", False))
    return out


def _chat(dialogue: Sequence[Turn], template: str, tokenizer: Any) -> list[tuple[str, bool]]:
    """The tokenizer's rendering, cut where the assistant begins and ends.

    Some templates rewrite earlier turns once later ones are there (thoughts are taken out); such
    earlier answers are then part of what is given, not of what is learnt.
    """
    turns = [{"role": turn.role, "content": turn.content} for turn in dialogue]

    def rendered(count: int, opened: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            turns[:count], tokenize=False, add_generation_prompt=opened
        )
        return text

    last = max(i for i, turn in enumerate(dialogue) if turn.role == "assistant")
    whole, out, at = rendered(last + 1, False), [], 0
    for i, turn in enumerate(dialogue[: last + 1]):
        if turn.role != "assistant":
            continue
        before, after = rendered(i, True), rendered(i + 1, False)
        if whole.startswith(before) and whole.startswith(after) and len(before) >= at:
            out += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
    return out
