"""From a recipe to the examples: what is trained on, what is held out, what deserves a remark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import data, tasks
from .columns import Columns
from .examples import usable
from .recipe import Recipe, RecipeError
from .tasks import Task


@dataclass(frozen=True)
class Corpus:
    """The examples of one training.

    Args:
        task: the task.
        columns: the columns in use.
        present: all columns of the data.
        train: examples to train on.
        test: examples held out.
        held: where those come from, in words.
        remarks: what the user should know.
    """

    task: Task
    columns: Columns
    present: list[str]
    train: list[Any]
    test: list[Any]
    held: str
    remarks: list[str]


def gather(recipe: Recipe) -> Corpus:
    """The examples that a recipe means; the same recipe gives the same ones.

    Raises:
        RecipeError: there is no such data, or it does not fit the task.
    """
    parts = data.load(recipe.data, recipe.subset)
    name = short(recipe.data)
    task, of = tasks.choose(recipe, parts["train"].column_names, name)
    remarks: list[str] = []
    every = _examples(task, of, parts["train"], name, recipe, remarks)
    if recipe.test_data is not None:
        held = short(recipe.test_data)
        rows = data.load_rows(recipe.test_data, recipe.subset)
        train, test = every, _examples(task, of, rows, held, recipe, remarks)
    elif "test" in parts:
        held = f"the test part of {name}"
        train, test = every, _examples(task, of, parts["test"], held, recipe, remarks)
    else:
        held = f"{recipe.test_share:.0%} of {name}"
        if len(every) < 2:
            raise RecipeError(f"{name} has one row; held-out data needs another (--test-data)")
        kept, out = data.split(len(every), recipe.test_share, recipe.seed, task.classes(every))
        train, test = [every[i] for i in kept], [every[i] for i in out]
    train = [train[i] for i in data.draw(len(train), recipe.samples, recipe.seed)]
    known = set(train)
    if twice := sum(example in known for example in test):
        remarks.append(f"{twice:,} of {len(test):,} held-out examples also occur in training")
    return Corpus(task, of, parts["train"].column_names, train, test, held, remarks)


def held_out(recipe: Recipe, task: Task, of: Columns, source: str | None) -> tuple[list[Any], str]:
    """The examples by which an adapter is measured, and where they come from.

    Args:
        recipe: what it was trained by.
        task: its task.
        of: the columns it was trained on.
        source: other data to measure it by.
    """
    if source is None:
        corpus = gather(recipe)
        return corpus.test, corpus.held
    rows = data.load_rows(source, recipe.subset)
    return _examples(task, of, rows, short(source), recipe, []), short(source)


def _examples(
    task: Task, of: Columns, rows: Any, where: str, recipe: Recipe, remarks: list[str]
) -> list[Any]:
    present: Sequence[str] = rows.column_names
    if lacking := [c for role, c in of.of.items() if c not in present and role != "input"]:
        raise RecipeError(
            f"{where} lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; it has "
            f"{', '.join(present)}. Training and held-out data need the same columns"
        )
    good, left_out = usable(task.examples(rows, of), where, recipe.skip_bad_rows)
    if left_out:
        remarks.append(f"{left_out:,} of {len(rows):,} rows of {where} are left out as unusable")
    return good


def short(source: str) -> str:
    """A path or hub id as it is named in messages."""
    return Path(source).name if Path(source).expanduser().exists() else source
