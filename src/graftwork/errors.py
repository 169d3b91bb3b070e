"""The errors of this library, and the few helpers that give each one its remedy."""

from __future__ import annotations

import difflib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

LONGEST, MANY = 256, 4096  # characters and words that are compared: a comparison takes time


class GraftworkError(Exception):
    """Base of every error that this library raises on purpose."""

    def __new__(cls, *args: Any) -> GraftworkError:
        """Of the classes, too, that PEFT's error has, under ``as_peft()``."""
        kinds = _worded(*args)[1] if len(args) == 1 else ()
        more = tuple(kind for kind in kinds if not issubclass(cls, kind))
        made: type[GraftworkError] = type(cls.__name__, (cls, *more), {}) if more else cls
        return super().__new__(made, *args)

    def __init__(self, *args: Any) -> None:
        super().__init__(*((_worded(*args)[0],) if len(args) == 1 else args))


class TargetError(GraftworkError, ValueError):
    """A config's pattern that matches nothing in the model, or a layer that cannot be adapted."""


class FileError(GraftworkError, RuntimeError):
    """An adapter folder that is missing, damaged, or does not fit the model."""


class StateError(GraftworkError, ValueError):
    """A request that the present adapters do not allow: an unknown name, a merged adapter, ..."""


class MergeError(GraftworkError, ValueError):
    """An update that cannot be written into the base weight."""


class TrainingError(GraftworkError, RuntimeError):
    """Training that would run without effect, or that has gone wrong."""


class PeftWarning(UserWarning):
    """Base of this library's warnings."""


@dataclass
class Policy:
    """What happens where PEFT only warns; ``as_peft()`` turns errors into warnings here.

    Args:
        lenient: whether errors are warnings.
        effect: what comes of a first training step that shows an adapter without effect: "error",
            "warn", or "off", which does not look; by default what GRAFTWORK_EFFECT says.
        words: gives a message the words that programs match in PEFT's, and its classes.

    Raises:
        ValueError: GRAFTWORK_EFFECT says something else.
    """

    lenient: bool = False
    effect: str = field(default_factory=lambda: os.environ.get("GRAFTWORK_EFFECT", "error"))
    words: Callable[[str], tuple[str, tuple[type, ...]]] | None = None

    def __post_init__(self) -> None:
        if self.effect not in ("error", "warn", "off"):
            raise ValueError(f"GRAFTWORK_EFFECT={self.effect!r} is none of error, warn and off")

    def raises(self) -> bool:
        """Whether an adapter without effect is an error."""
        return self.effect == "error" and not self.lenient


POLICY = Policy()


def nearest(word: str, words: Iterable[str], count: int = 3, cutoff: float = 0.5) -> str:
    """The words closest to ``word`` as ``'a', 'b'``; the empty string where none is near."""
    if len(word) > LONGEST:
        return ""
    near = itertools.islice((w for w in dict.fromkeys(words) if len(w) <= LONGEST), MANY)
    found = difflib.get_close_matches(word, list(near), n=count, cutoff=cutoff)
    return ", ".join(repr(w) for w in found)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``"; did you mean 'q_proj'?"`` or nothing."""
    near = nearest(word, words)
    return f"; did you mean {near}?" if near else ""


def warn(message: str, category: type[Warning] = PeftWarning) -> None:
    """Warn at the line of the user's program, not at a line of this library."""
    text, kinds = _worded(message)
    for kind in kinds:
        if issubclass(kind, Warning):
            category = kind
        elif issubclass(kind, Exception):
            raise kind(message)
    warnings.warn(text, category, stacklevel=_depth_of_user_code())


def worded(message: str) -> str:
    """A message as ``POLICY`` has it."""
    return str(_worded(message)[0])


def _worded(message: Any) -> tuple[Any, tuple[type, ...]]:
    if POLICY.words is None or not isinstance(message, str):
        return message, ()
    return POLICY.words(message)


def _depth_of_user_code() -> int:
    import sys

    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("graftwork"):
        if frame.f_back is None:
            break
        frame, depth = frame.f_back, depth + 1
    return depth
