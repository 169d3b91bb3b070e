"""Rows of a table as examples of a task; a row that cannot be one is counted and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .columns import Columns
from .recipe import RecipeError

SHOWN = 3  # bad rows that a message shows


class BadRowError(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Text:
    """A text, perhaps with a second one, and its label."""

    text: str
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Turn:
    """One contribution to a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


Dialogue = tuple[Turn, ...]
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def texts(rows: Any, columns: Columns, labelled: bool = True) -> list[Text | BadRowError]:
    """Rows with a text, and a label where the task has one."""
    names = _class_names(rows, columns.of["label"]) if labelled else None

    def one(row: dict[str, Any]) -> Text:
        pair = _text(row, columns.of["pair"]) if "pair" in columns.of else None
        label = _label(row, columns.of["label"], names) if labelled else None
        return Text(_text(row, columns.of["text"]), pair, label)

    return [_caught(one, row) for row in rows]


def dialogues(rows: Any, columns: Columns) -> list[Dialogue | BadRowError]:
    """Rows with a question and its answer, or a whole conversation."""
    of = columns.of

    def one(row: dict[str, Any]) -> Dialogue:
        if "messages" in of:
            return _conversation(row[of["messages"]], of["messages"])
        prompt = _text(row, of["prompt"])
        more = row.get(of.get("input", ""))
        if more is not None and str(more).strip():
            prompt = f"{prompt}\n\n{more}"
        return Turn("user", prompt), Turn("assistant", _text(row, of["completion"]))

    return [_caught(one, row) for row in rows]


def _caught(make: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> Any:
    try:
        return make(row)
    except BadRowError as error:
        return error


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if value is None or not str(value).strip():
        raise BadRowError(f"{column} is empty")
    if isinstance(value, (list, dict)):
        raise BadRowError(f"{column} holds a {type(value).__name__}, not a text")
    return str(value)


def _class_names(rows: Any, column: str) -> list[str] | None:
    return getattr(getattr(rows, "features", {}).get(column), "names", None)


def _label(row: dict[str, Any], column: str, names: list[str] | None) -> str:
    value = row[column]
    if isinstance(value, float):
        if value != value:
            raise BadRowError(f"{column} is empty")
        if not value.is_integer():
            raise BadRowError(f"{column} is {value}, a measure and no class")
        value = int(value)
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise BadRowError(f"{column} is {value}, which stands for no class")
        return names[value]
    return _text({column: value}, column).strip()


def _conversation(turns: Any, column: str) -> Dialogue:
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"{column} holds no list of messages")
    out = []
    for turn in turns:
        role = turn.get("role") or turn.get("from") if isinstance(turn, dict) else None
        content = turn.get("content") or turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise BadRowError(f"{column} has a message without a role or a text: {turn!r:.60}")
        out.append(Turn(SPEAKERS.get(role, role), content))
    if not any(turn.role == "assistant" for turn in out):
        raise BadRowError(f"{column} has no message of an assistant")
    return tuple(out)


def usable(found: Iterable[Any], where: str, skip: bool) -> tuple[list[Any], int]:
    """The good examples.

    Args:
        found: examples and bad rows, in the order of the data.
        where: the data, for messages.
        skip: leave bad rows out.

    Returns:
        The examples, and how many rows were left out.

    Raises:
        RecipeError: there are bad rows and nobody said to leave them out, or nothing but those.
    """
    good: list[Any] = []
    bad: list[tuple[int, BadRowError]] = []
    for i, example in enumerate(found):
        if isinstance(example, BadRowError):
            bad.append((i, example))
        else:
            good.append(example)
    if bad and (not skip or not good):
        lines = [f"  row {i + 1}: {reason}" for i, reason in bad[:SHOWN]]
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        remedy = "Repair them, or leave them out with --skip-bad-rows"
        raise RecipeError(
            f"{len(bad)} of {len(bad) + len(good)} rows of {where} cannot be used:\n"
            + "\n".join(lines)
            + f"{more}\n{remedy if good else 'Are these the right columns?'}"
        )
    return good, len(bad)
