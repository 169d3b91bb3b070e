"""Patterns for the ends of paths: PEFT's rule for ``rank_pattern`` and its kin, compiled once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from .errors import TargetError
from .regex import Pattern, compiled

PLAIN = re.compile(r"(?:\w|\\?\.)*?(\w+)")  # a path, whose dots may be escaped; its last word


@lru_cache(maxsize=1 << 14)
def ending(key: str) -> Pattern:
    """What a pattern means: whole names at the end of a path.

    Raises:
        TargetError: it is no regular expression.
    """
    return regex(rf"(.*\.)?({key})$", key)


def regex(text: str, name: str = "") -> Pattern:
    """A regular expression of a config; ``name``: as it stands there.

    Raises:
        TargetError: it is none.
    """
    try:
        return compiled(text)
    except re.error as error:
        name = f"{name or text!r:.200}"
        raise TargetError(f"the pattern {name} is no regular expression: {error}") from None


def exact(path: str) -> str:
    """A pattern for a path: as it is, as PEFT writes it, where its characters mean themselves."""
    return path if re.fullmatch(r"[\w.]+", path) else re.escape(path)


def pattern_matches(key: str, path: str, parameter: str = "weight") -> bool:
    """PEFT's rule for rank_pattern and its kin: a regex for the end of a path."""
    full = ending(key)
    return bool(full.match(path)) or bool(full.match(f"{path}.{parameter}"))


class Patterns:
    """Several patterns, of which a path is compared with those alone that may mean it."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.words: dict[str, list[int]] = {}  # how what a pattern means ends -> which patterns
        self.others: list[int] = []
        for i, key in enumerate(keys):
            plain = PLAIN.fullmatch(key)
            (self.words.setdefault(plain[1], []) if plain else self.others).append(i)

    def meaning(self, path: str, parameter: str = "weight") -> Iterator[str]:
        """Those that mean a path, in their order."""
        near = set(self.others)
        for name in (path.rpartition(".")[2], parameter.rpartition(".")[2]):
            for i in range(len(name)):  # a dot in a pattern is any character, so not whole names
                near.update(self.words.get(name[i:], ()))
        every = (self.keys[i] for i in sorted(near))
        return (key for key in every if pattern_matches(key, path, parameter))


@lru_cache(maxsize=64)
def patterns(*keys: str) -> Patterns:
    """Patterns that are looked at again and again."""
    return Patterns(keys)
