"""The errors of this library, and the few helpers that give each one its remedy."""

from __future__ import annotations

import difflib
import itertools
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

LONGEST, MANY = 256, 4096  # characters and words that are compared: a comparison takes time


class GraftworkError(Exception):
    """Base of every error that this library raises on purpose."""


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

    Raises:
        ValueError: GRAFTWORK_EFFECT says something else.
    """

    lenient: bool = False
    effect: str = field(default_factory=lambda: os.environ.get("GRAFTWORK_EFFECT", "error"))

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
    warnings.warn(message, category, stacklevel=_depth_of_user_code())


def _depth_of_user_code() -> int:
    import sys

    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("graftwork"):
        if frame.f_back is None:
            break
        frame, depth = frame.f_back, depth + 1
    return depth
