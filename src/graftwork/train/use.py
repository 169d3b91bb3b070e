"""Using a trained adapter from its folder alone: measure it, classify with it, write with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model.peft_model import PeftModel
from . import base, bundle, corpus, prompts, tasks
from .bundle import Note
from .columns import Columns
from .examples import Text
from .recipe import RecipeError


@dataclass(frozen=True)
class Adapted:
    """An adapter with everything that belongs to it.

    Args:
        folder: where it lies.
        note: what is known about it.
        tokenizer: the base model's.
        model: the base model with the adapter.
    """

    folder: Path
    note: Note
    tokenizer: Any
    model: PeftModel

    @property
    def task(self) -> tasks.Task:
        """Its task."""
        return tasks.TASKS[self.note.spec.task]


def load(folder: str | os.PathLike[str]) -> Adapted:
    """An adapter that ``graft train`` wrote, on the fastest device.

    Raises:
        RecipeError: there is none, or its base model is not there any more.
        FileError: the adapter's files are damaged.
    """
    path = Path(folder).expanduser()
    note = bundle.read(path)
    task, recipe = tasks.TASKS[note.spec.task], note.recipe
    tokenizer = base.load_tokenizer(str(path))
    source = _base(note, path)
    config = base.load_config(source, recipe.revision, **task.config(note.spec, tokenizer))
    base.set_attention(config, recipe.attention)
    model, _ = base.load_model(
        task.model_class, source, config, note.precision, recipe.revision, recipe.seed
    )
    adapted = PeftModel.from_pretrained(model, path)
    if torch.cuda.is_available():
        adapted.to("cuda")
    return Adapted(path, note, tokenizer, adapted)


def _base(note: Note, path: Path) -> str:
    try:
        return base.resolve(note.base)
    except RecipeError as error:
        raise RecipeError(
            f"{path} was trained on the base model {note.base}, which is not there any more; put "
            f'it back, or write its new place as "base" into {path / bundle.NOTE}'
        ) from error


@dataclass(frozen=True)
class Measured:
    """Metrics on held-out data.

    Args:
        metrics: by name; the task's own comes first.
        count: how many examples.
        source: where they come from.
        long: how many were longer than the limit.
        changed: training measured other values on the same data.
    """

    metrics: dict[str, float]
    count: int
    source: str
    long: int
    changed: bool


def evaluate(adapted: Adapted, data: str | None) -> Measured:
    """Measure an adapter.

    Args:
        adapted: the adapter.
        data: data to measure by; None: what was held out in training.

    Raises:
        RecipeError: the data is not there or does not fit.
    """
    note, task = adapted.note, adapted.task
    of = Columns(note.spec.layout, note.spec.columns)
    found, source = corpus.held_out(note.recipe, task, of, data)
    encoded = task.encode(found, note.spec, adapted.tokenizer, source)
    with base.autocast(note.precision, adapted.model.device):
        metrics = task.measure(
            adapted.model, encoded.samples, note.recipe.batch_size, adapted.tokenizer.pad_token_id
        )
    then = note.metrics["after"][task.metric]
    changed = data is None and abs(then - metrics[task.metric]) > 0.01 * max(1.0, abs(then))
    return Measured(metrics, len(found), source, encoded.long, changed)


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of a text.

    Args:
        text: the text.
        probabilities: label -> probability, the likeliest first.
    """

    text: str
    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """The likeliest label."""
        return next(iter(self.probabilities))


def predict(adapted: Adapted, texts: Sequence[str]) -> tuple[list[Prediction], int]:
    """The labels of texts, and how many of the texts were longer than the limit.

    Raises:
        RecipeError: the adapter is no classifier, or takes pairs of texts.
    """
    note, task = adapted.note, adapted.task
    if not isinstance(task, tasks.Classification):
        raise RecipeError(
            f"{adapted.folder} is for the task {task.name}; use `graft generate {adapted.folder} "
            '"a prompt"`'
        )
    if "pair" in note.spec.columns:
        raise RecipeError(
            f"{adapted.folder} takes pairs of texts; measure it on a table with `graft eval "
            f"{adapted.folder} --data FILE`"
        )
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise RecipeError(f"text {empty[0] + 1} is empty")
    encoded = task.encode([Text(text) for text in texts], note.spec, adapted.tokenizer, "")
    with base.autocast(note.precision, adapted.model.device):
        logits = tasks.scores(adapted.model, encoded.samples, 32, adapted.tokenizer.pad_token_id)
    out = []
    for text, row in zip(texts, logits.softmax(-1), strict=True):
        order = row.argsort(descending=True).tolist()
        out.append(Prediction(text, {note.spec.labels[i]: float(row[i]) for i in order}))
    return out, encoded.long


def generate(adapted: Adapted, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The text that a language model writes after a prompt.

    Args:
        adapted: the adapter.
        prompt: the prompt, without the template around it.
        tokens: at most so many new ones.
        temperature: 0 takes the likeliest token each time.
        seed: decides the choice at other temperatures.

    Raises:
        RecipeError: the adapter is no language model, or the prompt leaves no room.
    """
    import transformers

    note = adapted.note
    if not isinstance(adapted.task, tasks.Language):
        raise RecipeError(
            f"{adapted.folder} is for the task {adapted.task.name}; use `graft predict "
            f'{adapted.folder} "some text"`'
        )
    ids = prompts.question(prompt, note.spec.template, adapted.tokenizer)
    plain = adapted.model.get_base_model()
    most = base.longest(adapted.tokenizer, plain.config)
    virtual = base.taken(adapted.model.active_peft_config, type(plain))
    room = tokens if most is None else min(tokens, most - virtual - len(ids))
    if room < 1 or not len(ids):
        raise RecipeError(
            f"the prompt has {len(ids)} tokens{f' behind {virtual} virtual ones' * bool(virtual)} "
            f"and the model takes {most}; shorten the prompt"
            if len(ids)
            else "the prompt is empty"
        )
    transformers.set_seed(seed)
    given = torch.from_numpy(ids).long()[None].to(adapted.model.device)
    drawn = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.no_grad(), base.autocast(note.precision, adapted.model.device):
        out = adapted.model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=room,
            pad_token_id=adapted.tokenizer.pad_token_id,
            **drawn,
        )
    return str(adapted.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()
