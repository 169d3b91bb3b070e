"""What the fields of a config may hold in a file, by their annotations: data of the right kinds.

Configs that a program makes are checked by their fields; out of a file comes whatever JSON can say,
so that is checked here first, once, and what follows may trust the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import FileError
from .bounded import shown

EXACT = 2**53  # above it a float is no certain whole number
NAMES = str | list[str]
NUMBERS = dict[str, float | list[bool]]  # AdaLoRA's ranks are masks
LOOSE: dict[str, Any] = {  # fields whose annotation says no more than Any
    **dict.fromkeys(
        "target_modules exclude_modules layers_pattern feedforward_modules".split(), NAMES
    ),
    **dict.fromkeys("modules_to_save target_parameters".split(), list[str]),
    **dict.fromkeys(
        "rank_pattern alpha_pattern lambda_pattern block_size_pattern n_frequency_pattern".split(),
        NUMBERS,
    ),
    "layers_to_transform": int | list[int],
    "trainable_token_indices": list[int] | dict[str, list[int]],
    "effective_rank": float,
    "init_weights": bool | str,
    "loftq_config": dict[str, Any],
    "target_svd_config": Any,
}


# numbers of layers and of rounds, each of which is made or run one by one
COUNTS = frozenset(
    "depth xlora_depth encoder_num_layers shadow_num_hidden_layers boft_n_butterfly_factor "
    "num_cayley_neumann_terms psoft_svd_lowrank_niter".split()
)
MOST = 1024  # of such


def checked(cls: Any, data: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The values of a file, where every field can hold its own; a switch or a pattern that is
    ``null`` is not set.

    Raises:
        FileError: it is of another kind, or no number.
    """
    hints, found = _hints(cls), dict(data)
    for f in fields(cls):
        value = data.get(f.name)
        hint = LOOSE.get(f.name, Any) if hints.get(f.name) is Any else hints.get(f.name, Any)
        if "options" in f.metadata:
            hint = dict[str, Any] | bool | list[Any]
        if value is None:
            if hint is bool or get_origin(hint) is dict:
                found.pop(f.name, None)
                continue
            loose = hints.get(f.name, Any) is Any
            hint = hint if f.name in data and not loose else Any
        if not fits(value, hint):
            raise FileError(
                f"{where} sets {f.name} to {shown(value)}, where {_words(hint)} is expected; it is "
                "damaged, or another program's"
            )
        if f.name in COUNTS and value is not None and value > MOST:
            raise FileError(f"{where} sets {f.name} to {shown(value)}, and {MOST} are the most")
    return found


@lru_cache(maxsize=256)
def _hints(cls: Hashable) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # a config of the user's, with a type that only type checkers know
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON can stand where an annotation is."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in args)
    if hint is NoneType:
        return value is None
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(one, args[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, args[1]) for one in value.values())
    if hint is bool:
        return isinstance(value, bool) or value in (0, 1)
    if hint in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            return False
        return hint is float or isinstance(value, int) or (value % 1 == 0 and abs(value) < EXACT)
    return isinstance(value, str) if hint is str else True


def _words(hint: Any) -> str:
    """An annotation as a message has it."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [one for one in args if one is not NoneType]
        return " or ".join(dict.fromkeys(map(_words, kinds)))
    if origin in (list, Sequence):
        return f"a list of such as {_words(args[0])}"
    return "an object" if origin is dict else names.get(hint, "a text")
