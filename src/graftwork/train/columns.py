"""Which columns of a table hold what: told by the user, or recognised by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import did_you_mean
from .recipe import Recipe, RecipeError, flag


@dataclass(frozen=True)
class Layout:
    """A known shape of data.

    Args:
        name: how it is called in messages and in ``graftwork.json``.
        needs: role -> the names a column in that role may have, best first.
        may: the same for roles that may be absent.
    """

    name: str
    needs: dict[str, tuple[str, ...]]
    may: dict[str, tuple[str, ...]] = field(default_factory=dict)


TEXT = ("text", "sentence", "content", "review", "document", "question", "utterance", "tweet")
LABEL = ("label", "labels", "category", "class", "intent", "sentiment", "language", "topic")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))

CLASSIFICATION = (
    *(Layout("pair + label", {"text": (a,), "pair": (b,), "label": LABEL}) for a, b in PAIRS),
    Layout("text + label", {"text": TEXT, "label": LABEL}),
)
CONVERSATIONS = Layout("messages", {"messages": ("messages", "conversations", "conversation")})
ALPACA = Layout(
    "instruction + output",
    {"prompt": ("instruction",), "completion": ("output", "response")},
    {"input": ("input", "context")},
)
INSTRUCTION = (
    CONVERSATIONS,
    ALPACA,
    Layout("prompt + completion", {"prompt": ("prompt",), "completion": ("completion",)}),
    Layout("query + response", {"prompt": ("query", "prompt"), "completion": ("response",)}),
    Layout("question + answer", {"prompt": ("question",), "completion": ("answer",)}),
)
LANGUAGE = (Layout("text", {"text": ("text", "content", "story", "document")}),)


@dataclass(frozen=True)
class Columns:
    """The columns in use.

    Args:
        layout: the layout's name.
        of: role -> column.
    """

    layout: str
    of: dict[str, str]

    def __str__(self) -> str:
        return ", ".join(
            f"{role} = {column}" if role != column else column for role, column in self.of.items()
        )


def find(
    recipe: Recipe, layouts: Sequence[Layout], present: Sequence[str], where: str
) -> Columns | None:
    """The columns in use, or None where no layout fits.

    Args:
        recipe: its ``*_column`` keys decide; what they leave open is recognised.
        layouts: the layouts of a task, in the order in which they are tried.
        present: the columns of the data.
        where: the data, for messages.

    Raises:
        RecipeError: the user named a column that is not there.
    """
    told = _told(recipe, present, where)
    for layout in layouts:
        roles = {**layout.needs, **layout.may}
        if not told.keys() <= roles.keys():
            continue
        found = {role: told.get(role) or _first(names, present) for role, names in roles.items()}
        if all(found[role] for role in layout.needs):
            return Columns(layout.name, {role: c for role, c in found.items() if c})
    return None


def _told(recipe: Recipe, present: Sequence[str], where: str) -> dict[str, str]:
    keys = {
        "text": "text_column",
        "pair": "text_pair_column",
        "label": "label_column",
        "prompt": "prompt_column",
        "completion": "completion_column",
    }
    told = {role: str(c) for role, key in keys.items() if (c := getattr(recipe, key)) is not None}
    for role, column in told.items():
        if column not in present:
            near = did_you_mean(column, present)
            raise RecipeError(
                f"{flag(keys[role])}: {where} has no column {column!r}{near}. "
                f"Its columns are: {', '.join(present)}"
            )
    return told


def _first(names: Sequence[str], present: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in present}
    return next((lower[name] for name in names if name in lower), None)


def explain(layouts: Sequence[Layout], present: Sequence[str], where: str, task: str) -> str:
    """Why no layout fits, and what to do about it."""
    options = " or ".join(f"({', '.join(la.needs)})" for la in layouts[-2:])
    keys = {"text": "text", "label": "label", "prompt": "prompt", "completion": "completion"}
    wanted = [keys[role] for role in layouts[-1].needs if role in keys]
    example = " ".join(
        f"--{role}-column {column}"
        for role, column in zip(wanted, [*present, *present], strict=False)
    )
    return (
        f"{where} has the columns {', '.join(present)}; {task} needs {options}. Say which columns "
        f"to use, for example {example}"
    )
