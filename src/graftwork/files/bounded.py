"""Reading what others wrote: of bounded size, and never more than data."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import FileError

MAX_JSON = 8 * 2**20  # bytes; a config is a few kilobytes
MAX_INDEX = 20 * 2**20  # bytes; that of a model of 138,000 tensors has 15 MB
MAX_PIECES = 500_000  # values in such a file, each of which takes up to a hundred bytes
LARGEST = 2**63 - 1  # of a whole number: what tensors can have
SHOWN = 200  # characters of a value in a message


def shown(value: Any, limit: int = SHOWN) -> str:
    """A value as a message shows it: never long, however large it is."""
    if isinstance(value, str):
        value = value[: limit + 1]
    elif isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}" if _heavy(value, limit) else repr(value)
    elif isinstance(value, int) and value.bit_length() > 256:
        return "a whole number of more than 256 bits"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _heavy(value: Any, left: int) -> bool:
    """Whether a collection has more than ``left`` characters, looked at no further than that."""
    waiting = [value]
    while waiting and left >= 0:
        one = waiting.pop()
        left -= len(one) if isinstance(one, str) else 1
        if isinstance(one, int) and one.bit_length() > 256:
            return True
        if isinstance(one, (list, tuple, set, dict)):
            if len(one) > left:
                return True
            waiting += [*one, *(one.values() if isinstance(one, dict) else ())]
    return left < 0


def content(path: Path, limit: int = MAX_JSON) -> bytes:
    """What a file holds.

    Raises:
        FileError: it is larger than the limit, no plain file, or cannot be read.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever, a device has no end
            raise FileError(f"{path} is no file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if len(data) > limit:
        raise FileError(
            f"{path} has {size} bytes, far more than a file of its kind (at most {limit}); it is "
            "damaged or hostile"
        )
    return data


LONG = re.compile(rb"\d{18}")  # a number that may be larger than LARGEST


def parsed(data: bytes, where: object, most: int = MAX_PIECES) -> Any:
    """The content of a JSON file.

    Args:
        data: it.
        where: the file, for messages.
        most: how many values it may hold.

    Raises:
        FileError: it is none, or holds more.
    """
    if (pieces := sum(data.count(char) for char in (b",", b"[", b"{"))) > most:
        raise FileError(f"{where} holds {pieces} values, more than any file of its kind")
    try:
        read = _whole if LONG.search(data) else None  # which costs more than all the rest
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once, parse_int=read)
    except RecursionError as error:
        raise FileError(f"{where} is nested deeper than any file of its kind") from error
    except ValueError as error:
        raise FileError(f"{where} is no JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} stands there twice")
    return found


def _whole(text: str) -> int:
    if len(text) > 20 or not -LARGEST <= (value := int(text)) <= LARGEST:
        raise ValueError(f"{text:.30} is larger than any number in such a file")
    return value


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: the file is none, too large, damaged, or holds something else.
    """
    data = parsed(content(path, limit), path)
    if not isinstance(data, dict):
        raise FileError(f"{path} holds no object, but {shown(data)}; it is damaged")
    return data


def weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor by an index of shards.

    Raises:
        FileError: it is no such index, or names files outside of its folder.
    """
    return mapped_weights(content(path, MAX_INDEX), path)


def mapped_weights(data: bytes, path: object) -> dict[str, str]:
    """As of ``weight_map``, from the content of the file."""
    try:
        whole = parsed(data, path)
    except FileError as error:
        raise FileError(f"{path} is no index of shards: {error}") from error
    found = whole.get("weight_map") if isinstance(whole, dict) else None
    if not isinstance(found, dict) or not all(isinstance(n, str) for n in found.values()):
        raise FileError(f"{path} is no index of shards: it has no weight_map of names and files")
    if outside := [n for n in dict.fromkeys(found.values()) if not plain_name(n)]:
        raise FileError(f"{path} names files outside of its folder: {shown(outside[0])}")
    return found


RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{i}" for p in ("com", "lpt") for i in range(1, 10))}


def plain_name(name: str) -> bool:
    """Whether a name is that of one file or folder, on every system."""
    return (
        0 < len(name.encode("utf-8", "replace")) <= 255
        and name not in (".", "..")
        and name.partition(".")[0].lower() not in RESERVED
        and not any(ord(char) < 32 or char in '/\\:*?"<>|' for char in name)
    )
