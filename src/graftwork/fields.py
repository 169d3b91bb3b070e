"""Fields of configs that say themselves what they may be: ``r: int = whole(8)``.

A config checks them when it is made, by the engine's own hand; the default is always allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from math import inf
from typing import Any

from .errors import did_you_mean, worded

Check = Callable[[Any, str], None]


def checked(default: Any, check: Check) -> Any:
    """A field with a default, and what refuses other values: ``check(value, name)``."""
    return field(default=default, metadata={"check": check})


def whole(default: Any, least: int = 1) -> Any:
    """A whole number from ``least`` on."""
    return checked(default, lambda value, name: check_rank(value, name, least))


def probability(default: Any) -> Any:
    """A number from 0 to below 1."""
    return checked(default, check_probability)


def positive(default: Any) -> Any:
    """A number above 0."""
    return checked(default, check_positive)


def not_negative(default: Any) -> Any:
    """A number from 0 on."""
    return checked(default, lambda value, name: check_positive(value, name, or_zero=True))


def between(default: Any, low: float, high: float) -> Any:
    """A number from ``low`` to ``high``."""

    def check(value: Any, name: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, not {value!r}")
        if not low <= value <= high:
            where = f"at least {low}" if high == inf else f"between {low} and {high}"
            raise ValueError(f"{name}={value!r} is not {where}")

    return checked(default, check)


def choice(default: Any, *others: Any) -> Any:
    """One of some values, the default first."""
    every = (default, *others)
    check = lambda value, name: check_choice(value, name, every)  # noqa: E731
    return field(default=default, metadata={"check": check, "choices": every})


def ranges(default: Any) -> Any:
    """Pairs [start, end) of whole numbers from 0 on."""
    return checked(default, check_ranges)


def options(kind: type[Options]) -> Any:
    """None, or a config within the config: an object of ``kind``, or a dictionary out of a file."""
    return field(default=None, metadata={"options": kind})


def check_fields(config: Any) -> None:
    """Refuse the first value of a config that its field does not allow.

    Raises:
        ValueError: which field, what it holds, and what it may be.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        usual = type(value) is type(f.default) and value == f.default  # 8.0 and True are no 8, no 1
        if (check := f.metadata.get("check")) and not usual:
            check(value, f.name)
        if (kind := f.metadata.get("options")) and value is not None:
            setattr(config, f.name, kind.of(value))


def set_beyond(data: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """What a dictionary sets beyond the fields that are known; unset ones are no matter."""
    known = set(known)
    unset: tuple[Any, ...] = (None, False, 0, "", {}, [])
    return {k: v for k, v in data.items() if k not in known and v not in unset}


class Options:
    """A config within a config, such as that of a start or of a variant."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, given: Any) -> Any:
        """What stands in such a field: one of these, a dictionary out of a file, or nothing.

        Raises:
            TypeError: it is something else.
            ValueError: the dictionary sets what this has no field for.
        """
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"{given!r} stands where a {cls.__name__} is expected; leave it out, or give "
                f"{cls.__name__}(...) or a dictionary of its fields"
            )
        every: Any = fields(cls)  # type: ignore[arg-type]
        data, known = given or {}, [f.name for f in every]
        if odd := set_beyond(data, known):
            raise ValueError(
                f"{cls.__name__} has no {', '.join(odd)}{did_you_mean(next(iter(odd)), known)}; it "
                f"has {known}"
            )
        found = {name: data[name] for name in known if name in data}
        made = cls(**{f.name: found.pop(f.name) for f in every if f.init and f.name in found})
        for name, value in found.items():
            setattr(made, name, value)
        return made


def check_rank(value: Any, name: str, least: int = 1) -> None:
    """Refuse a rank that is not a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}; try {name}=8")
    if value < least:
        raise ValueError(worded(f"{name} must be at least {least}, not {value}; try {name}=8"))


def check_choice(value: Any, name: str, choices: Sequence[Any]) -> None:
    """Refuse a value that is none of the choices."""
    if not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices
    ):
        near = did_you_mean(str(value), [str(one) for one in choices])
        raise ValueError(f"{name}={value!r} is not known{near}; it is one of {list(choices)}")


def check_ranges(value: Any, name: str) -> None:
    """Refuse what is no list of pairs [start, end) of whole numbers."""
    for pair in value if isinstance(value, (list, tuple)) else [value]:
        whole = isinstance(pair, (list, tuple)) and [type(n) for n in pair] == [int, int]
        if not whole or not 0 <= pair[0] < pair[1]:
            raise ValueError(
                f"{name} holds {pair!r}; give pairs [start, end) of whole numbers with "
                "0 <= start < end, such as [[0, 4], [2, 5]]"
            )


def check_probability(value: Any, name: str) -> None:
    """Refuse what is no probability below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} is a probability below 1, not {value!r}")


def check_positive(value: Any, name: str, or_zero: bool = False) -> None:
    """Refuse what is no number above zero."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{name}={value!r} must be a number {'from' if or_zero else 'above'} zero")
