"""Regular expressions out of files, in bounded time: what ``re`` could try for ever is matched here
by the set of all places that it can reach, which no pattern makes larger than the text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from math import log2
from typing import Any, Protocol

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the names until Python 3.10
    try:
        from re import _compiler as compiler  # type: ignore[attr-defined]
        from re import _parser as parser  # type: ignore[attr-defined]
    except ImportError:
        import sre_compile as compiler
        import sre_parse as parser

LONGEST = 1 << 16  # characters of a pattern
PLACES = 64  # in a long path; so many ways has ".*"
FREE = 20  # bits; so many ways, 2^FREE, re may try one after another
LEAST_REPEATED = 1 << 10  # times at the least: re counts them one by one
REPEATS = {parser.MAX_REPEAT, parser.MIN_REPEAT, getattr(parser, "POSSESSIVE_REPEAT", None)}
BACKWARDS = {  # what is decided by what was matched before
    parser.GROUPREF,
    parser.GROUPREF_EXISTS,
    getattr(parser, "ATOMIC_GROUP", 0),
    getattr(parser, "POSSESSIVE_REPEAT", 0),
}


class Pattern(Protocol):
    """What patterns are asked: whether a text begins with what is meant, is it, or holds it."""

    def match(self, text: str) -> Any: ...
    def fullmatch(self, text: str) -> Any: ...
    def search(self, text: str) -> Any: ...


@lru_cache(maxsize=1 << 14)
def compiled(text: str) -> Pattern:
    """A pattern that is matched in bounded time.

    Raises:
        re.error: it is no regular expression, or one that cannot be bounded.
    """
    if len(text) > LONGEST:
        raise re.error(f"it has {len(text)} characters, and {LONGEST} are allowed")
    try:
        simple = re.compile(text)
        tree = parser.parse(text)
        bits, nested = _ways(tree)
    except (RecursionError, OverflowError) as error:
        raise re.error(f"it is nested too deep, or a number in it is too large: {error}") from error
    return Reach(tree) if nested or bits > FREE else simple


def _ways(tree: Any) -> tuple[float, bool]:
    """How many ways there are through a pattern, in bits, and whether what varies is repeated."""
    bits, nested = 0.0, False
    for op, value in tree:
        for inner in _inside(op, value):
            more, deeper = _ways(inner)
            bits, nested = bits + more, nested or deeper
            nested |= op in REPEATS and value[1] > 1 and any(_varies(*one) for one in _flat(inner))
        if op in REPEATS:
            bits += log2(min(value[1] - value[0] + 1, PLACES))
            nested |= value[0] > LEAST_REPEATED
    return bits, nested


def _varies(op: Any, value: Any) -> bool:
    return op is parser.BRANCH or (op in REPEATS and value[0] != value[1])


def _flat(tree: Any) -> Iterator[tuple[Any, Any]]:
    for op, value in tree:
        yield op, value
        for inner in _inside(op, value):
            yield from _flat(inner)


def _inside(op: Any, value: Any) -> list[Any]:
    """The patterns within a part of one."""
    if op in REPEATS or op is parser.SUBPATTERN:
        return [value[-1]]
    if op is parser.BRANCH:
        return list(value[1])
    if op in (parser.ASSERT, parser.ASSERT_NOT):
        return [value[1]]
    if op is parser.GROUPREF_EXISTS:
        return [tree for tree in value[1:] if tree is not None]
    return [value] if op is getattr(parser, "ATOMIC_GROUP", 0) else []


class Reach:
    """A pattern as a walk over sets of places in a text.

    Args:
        tree: as it was parsed.

    Raises:
        re.error: it looks back at what it has matched, which cannot be bounded.
    """

    def __init__(self, tree: Any) -> None:
        if any(op in BACKWARDS for op, _ in _flat(tree)):
            raise re.error(
                "it refers to what it has matched, and repeats so much that matching might never "
                "end; write it with fewer repeats"
            )
        self.tree, self.flags = tree, tree.state.flags

    def match(self, text: str) -> bool:
        return bool(self._after(self.tree, text, {0}, self.flags))

    def fullmatch(self, text: str) -> bool:
        return len(text) in self._after(self.tree, text, {0}, self.flags)

    def search(self, text: str) -> bool:
        return bool(self._after(self.tree, text, set(range(len(text) + 1)), self.flags))

    def _after(self, tree: Any, text: str, places: set[int], flags: int) -> set[int]:
        for op, value in tree:
            if not places:
                break
            places = self._step(op, value, text, places, flags)
        return places

    def _step(self, op: Any, value: Any, text: str, places: set[int], flags: int) -> set[int]:
        if op in REPEATS:
            least, most, tree = value
            return self._repeat(least, most, tree, text, places, flags)
        if op is parser.BRANCH:
            return set().union(*(self._after(tree, text, places, flags) for tree in value[1]))
        if op is parser.SUBPATTERN:
            _, more, fewer, tree = value
            return self._after(tree, text, places, (flags | more) & ~fewer)
        if op in (parser.ASSERT, parser.ASSERT_NOT):
            way, tree = value
            return self._look(op is parser.ASSERT, way, tree, text, places, flags)
        if op is parser.LITERAL and not flags & re.IGNORECASE:
            return {i + 1 for i in places if text.startswith(chr(value), i)}
        one = _single(op, tuple(value) if isinstance(value, list) else value, flags)
        width = 0 if op is parser.AT else 1
        return {i + width for i in places if one.match(text, i)}

    def _repeat(
        self, least: int, most: int, tree: Any, text: str, places: set[int], flags: int
    ) -> set[int]:
        now, seen = places, [places]
        for _ in range(least):
            now = self._after(tree, text, now, flags)
            if now in seen:  # from here on they come again and again
                start = seen.index(now)
                now = seen[start + (least - start) % (len(seen) - start)]
                break
            seen.append(now)
        found = set(now)
        for _ in range(most - least):
            now = self._after(tree, text, now, flags) - found
            if not now:
                break
            found |= now
        return found

    def _look(
        self, wanted: bool, way: int, tree: Any, text: str, places: set[int], flags: int
    ) -> set[int]:
        if way > 0:
            return {i for i in places if bool(self._after(tree, text, {i}, flags)) == wanted}
        width = tree.getwidth()[0]  # a fixed one
        before = {i for i in places if i >= width}
        there = {i for i in before if i in self._after(tree, text, {i - width}, flags)}
        return there if wanted else places - there


@lru_cache(maxsize=1 << 12)
def _single(op: Any, value: Any, flags: int) -> re.Pattern[str]:
    """What one character, or a place between two, has to be, as ``re`` has it."""
    state = parser.State()
    state.flags = flags
    item = op, list(value) if isinstance(value, tuple) else value
    found: re.Pattern[str] = compiler.compile(parser.SubPattern(state, [item]), flags)
    return found
