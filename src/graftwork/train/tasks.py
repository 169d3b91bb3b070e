"""The tasks, as a table: what a row becomes, which model learns it, and how it is measured.

A new task is one class here and one line in ``TASKS``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..config import TaskType
from ..errors import did_you_mean
from . import columns, examples, prompts
from .columns import Columns, Layout
from .recipe import Recipe, RecipeError
from .samples import IGNORED, Sample, Samples, in_batches


@dataclass(frozen=True)
class Spec:
    """What the adapter's user must know about the data it was trained on; kept beside it.

    Args:
        task: a key of ``TASKS``.
        layout: the layout of the columns.
        columns: role -> column.
        max_length: tokens of the longest sample.
        labels: the classes, in the order of the head's outputs.
        template: the text around a prompt, or ``chat`` for the tokenizer's own.
    """

    task: str
    layout: str
    columns: dict[str, str]
    max_length: int
    labels: tuple[str, ...] = ()
    template: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Spec:
        """From plain data.

        Raises:
            ValueError: it is of other kinds.
        """
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(data)


@dataclass(frozen=True)
class Encoded:
    """Samples, and what was done to fit them.

    Args:
        samples: the samples.
        long: how many examples were longer than the limit.
        longest: tokens of the longest example before cutting.
    """

    samples: Samples
    long: int
    longest: int


class Task:
    """One task; the methods say in their order what happens to the data."""

    name: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()  # other names for it
    about: ClassVar[str]
    kind: ClassVar[TaskType]
    model_class: ClassVar[str]
    layouts: ClassVar[tuple[Layout, ...]]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    length: ClassVar[int]  # the limit where the user gives none
    cutting: ClassVar[str] = "cut at the end"  # what happens to a longer one

    def find(self, recipe: Recipe, present: Sequence[str], where: str) -> Columns | None:
        """The columns in use; None where the data does not look like this task's."""
        return columns.find(recipe, self.layouts, present, where)

    def examples(self, rows: Any, of: Columns) -> list[Any]:
        """Each row as an example or a ``BadRowError``."""
        raise NotImplementedError(f"{type(self).__name__} must say what a row is")

    def spec(self, of: Columns, recipe: Recipe, tokenizer: Any, found: Sequence[Any]) -> Spec:
        """What is learnt, from the columns and the training examples; the limit comes later."""
        return Spec(self.name, of.layout, of.of, 0)

    def classes(self, found: Sequence[Any]) -> list[int] | None:
        """A class for each example, by which the held-out part is balanced."""
        return None

    def config(self, spec: Spec, tokenizer: Any) -> dict[str, Any]:
        """Fields of the base model's config."""
        return {}

    def check_base(self, config: Any, source: str) -> None:
        """Refuse a base model that cannot do this task."""

    def encode(self, found: Sequence[Any], spec: Spec, tokenizer: Any, where: str) -> Encoded:
        """Examples as samples."""
        raise NotImplementedError(f"{type(self).__name__} must say what a sample is")

    def measure(self, model: Any, samples: Samples, size: int, pad: int) -> dict[str, float]:
        """The metrics of a model on samples with labels; ``loss`` and ``self.metric`` are there."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is measured")


class Classification(Task):
    """A text, or a pair of texts, gets one of several labels."""

    name = "classification"
    also: ClassVar[tuple[str, ...]] = ("text-classification", "seq-cls", "sequence-classification")
    about = "one label for a text"
    kind, model_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"
    layouts, metric, length = columns.CLASSIFICATION, "accuracy", 256

    def examples(self, rows: Any, of: Columns) -> list[Any]:
        return examples.texts(rows, of)

    def spec(self, of: Columns, recipe: Recipe, tokenizer: Any, found: Sequence[Any]) -> Spec:
        labels = {text.label for text in found}
        column = of.of["label"]
        if len(labels) < 2:
            raise RecipeError(
                f"every row has the same label in {column}: {labels}; nothing to learn"
            )
        if len(labels) > 20 and len(labels) > len(found) / 2:
            raise RecipeError(
                f"{column} has {len(labels)} different values in {len(found)} rows, so it holds "
                "texts or measures rather than labels; name the right one with --label-column"
            )
        return replace(super().spec(of, recipe, tokenizer, found), labels=_in_order(labels))

    def classes(self, found: Sequence[Any]) -> list[int] | None:
        number = {label: i for i, label in enumerate(_in_order({text.label for text in found}))}
        return [number[text.label] for text in found]

    def config(self, spec: Spec, tokenizer: Any) -> dict[str, Any]:
        return {
            "num_labels": len(spec.labels),
            "id2label": dict(enumerate(spec.labels)),
            "label2id": {label: i for i, label in enumerate(spec.labels)},
            "pad_token_id": tokenizer.pad_token_id,
            "problem_type": "single_label_classification",
        }

    def encode(self, found: Sequence[Any], spec: Spec, tokenizer: Any, where: str) -> Encoded:
        number = {label: i for i, label in enumerate(spec.labels)}
        unseen: dict[str, int] = {}
        for text in found:
            if text.label is not None and text.label not in number:
                unseen[text.label] = unseen.get(text.label, 0) + 1
        if unseen:
            raise RecipeError(_unseen(unseen, spec, where))
        pairs = [text.pair for text in found] if found and found[0].pair is not None else None
        whole = tokenizer([text.text for text in found], pairs)
        lengths = [len(ids) for ids in whole["input_ids"]]
        samples = []
        for i, text in enumerate(found):
            row = {key: whole[key][i] for key in whole}
            if lengths[i] > spec.max_length:
                row = tokenizer(text.text, text.pair, truncation=True, max_length=spec.max_length)
            types = row.get("token_type_ids") if pairs is not None else None
            samples.append(
                Sample(
                    np.asarray(row["input_ids"], dtype=np.int32),
                    None if text.label is None else number[text.label],
                    None if types is None else np.asarray(types, dtype=np.int32),
                )
            )
        long = sum(n > spec.max_length for n in lengths)
        return Encoded(Samples(samples), long, max(lengths, default=0))

    def measure(self, model: Any, samples: Samples, size: int, pad: int) -> dict[str, float]:
        logits = scores(model, samples, size, pad)
        wanted = torch.tensor([int(s.labels) for s in samples.items])  # type: ignore[arg-type]
        found = logits.argmax(-1)
        loss = torch.nn.functional.cross_entropy(logits, wanted).item()
        right = (found == wanted).float().mean().item()
        return {"accuracy": right, "macro_f1": _macro_f1(found, wanted), "loss": loss}


class Language(Task):
    """A language model reads on from a text."""

    name = "language"
    also: ClassVar[tuple[str, ...]] = ("causal-lm", "clm", "language-modelling")
    about = "plain text, every token is learnt"
    kind, model_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"
    layouts: ClassVar[tuple[Layout, ...]] = columns.LANGUAGE
    metric, length = "loss", 1024
    higher_is_better = False
    cutting = "cut into several samples"

    def examples(self, rows: Any, of: Columns) -> list[Any]:
        return examples.texts(rows, of, labelled=False)

    def check_base(self, config: Any, source: str) -> None:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
        if encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise RecipeError(
                f"--model: {source} is a {config.model_type}, which does not write text from left "
                f"to right, so it cannot learn the task {self.name}; give a causal language model"
            )

    def encode(self, found: Sequence[Any], spec: Spec, tokenizer: Any, where: str) -> Encoded:
        samples, long, longest = [], 0, 0
        texts = tokenizer([t.text for t in found], add_special_tokens=False)["input_ids"]
        for ids in texts:
            whole = [*prompts.start(tokenizer), *ids, *prompts.end(tokenizer)]
            long, longest = long + (len(whole) > spec.max_length), max(longest, len(whole))
            for at in range(0, len(whole), spec.max_length):
                piece = np.asarray(whole[at : at + spec.max_length], dtype=np.int32)
                if len(piece) > 1:  # one token predicts nothing
                    samples.append(Sample(piece, piece))
        return Encoded(Samples(samples), long, longest)

    def measure(self, model: Any, samples: Samples, size: int, pad: int) -> dict[str, float]:
        total, count = 0.0, 0
        for _, batch in in_batches(samples, size, pad):
            learnt = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(run(model, batch).loss) * learnt
            count += learnt
        loss = total / max(1, count)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class Instruction(Language):
    """A language model answers; only the answers are learnt."""

    name = "instruction"
    also: ClassVar[tuple[str, ...]] = ("instruction-tuning", "sft", "chat")
    about = "prompts and answers, only the answers are learnt"
    layouts = columns.INSTRUCTION
    cutting = "cut: prompts at their start, answers at their end"

    def examples(self, rows: Any, of: Columns) -> list[Any]:
        return examples.dialogues(rows, of)

    def spec(self, of: Columns, recipe: Recipe, tokenizer: Any, found: Sequence[Any]) -> Spec:
        template = prompts.choose(recipe.template, of.layout, tokenizer)
        return replace(super().spec(of, recipe, tokenizer, found), template=template)

    def encode(self, found: Sequence[Any], spec: Spec, tokenizer: Any, where: str) -> Encoded:
        samples, long, longest = [], 0, 0
        for dialogue in found:
            ids, labels = prompts.encode(dialogue, spec.template, tokenizer)
            long, longest = long + (len(ids) > spec.max_length), max(longest, len(ids))
            ids, labels = prompts.fit(ids, labels, spec.max_length)
            samples.append(Sample(ids, labels))
        return Encoded(Samples(samples), long, longest)


TASKS: dict[str, Task] = {t.name: t for t in (Classification(), Instruction(), Language())}


def choose(recipe: Recipe, present: Sequence[str], where: str) -> tuple[Task, Columns]:
    """The task that the user named, or the first that the columns fit.

    Raises:
        RecipeError: there is no such task, or the columns do not fit.
    """
    wanted = recipe.task.lower().replace("_", "-")
    by_name = {n.replace("_", "-"): t for t in TASKS.values() for n in (t.name, *t.also)}
    if wanted != "auto" and wanted not in by_name:
        near = did_you_mean(wanted, by_name) or f"; there are {', '.join(TASKS)}"
        raise RecipeError(f"--task: there is no task {recipe.task!r}{near}")
    offered = list(TASKS.values()) if wanted == "auto" else [by_name[wanted]]
    for task in offered:
        if (of := task.find(recipe, present, where)) is not None:
            return task, of
    if wanted != "auto":
        raise RecipeError(columns.explain(offered[0].layouts, present, where, offered[0].name))
    raise RecipeError(
        f"{where} has the columns {', '.join(present)}, which fit no task by their names. Say what "
        "to do: --task classification --text-column ... --label-column ..., or --task instruction "
        "--prompt-column ... --completion-column ..."
    )


@torch.no_grad()
def run(model: Any, batch: dict[str, Tensor]) -> Any:
    """The model's outputs for a batch, on the model's device."""
    return model(**{key: tensor.to(model.device) for key, tensor in batch.items()})


def scores(model: Any, samples: Samples, size: int, pad: int) -> Tensor:
    """A classifier's outputs (samples, classes), in the order of the samples."""
    out: list[Tensor | None] = [None] * len(samples)
    for rows, batch in in_batches(samples, size, pad):
        batch.pop("labels", None)
        for row, values in zip(rows, run(model, batch).logits.float().cpu(), strict=True):
            out[row] = values
    return torch.stack([values for values in out if values is not None])


def _in_order(labels: set[str | None]) -> tuple[str, ...]:
    """Labels in a stable order: numbers by value, words by letter."""
    words = [label for label in labels if label is not None]
    try:
        return tuple(sorted(words, key=int))
    except ValueError:
        return tuple(sorted(words))


def _unseen(unseen: dict[str, int], spec: Spec, where: str) -> str:
    first = next(iter(unseen))
    return (
        f"{where} has {len(unseen)} label{'s' * (len(unseen) > 1)} that training does not: "
        + ", ".join(f"{label!r} ({n} rows)" for label, n in list(unseen.items())[:5])
        + f"{did_you_mean(first, spec.labels)}. Training has {len(spec.labels)}: "
        + ", ".join(spec.labels[:12])
        + (", ..." if len(spec.labels) > 12 else "")
        + ". Take those rows out, or put some of them into the training data"
    )


def _macro_f1(found: Tensor, wanted: Tensor) -> float:
    """The mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    values = []
    for label in sorted(set(wanted.tolist())):
        hit = ((found == label) & (wanted == label)).sum()
        values.append(2 * hit / ((found == label).sum() + (wanted == label).sum()))
    return torch.stack(values).mean().item()
