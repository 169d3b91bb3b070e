"""What an adapter may be called: it is the name of a module in the model, and of a folder."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from ..errors import StateError

BASE = "__base__"  # a row of a mixed batch that no adapter touches
TAKEN = frozenset(vars(nn.Module()))  # attributes that torch writes, such as ``training``
LONGEST = 255  # bytes of a folder's name, on every file system in use


def check_name(name: str, taken: Container[str]) -> None:
    """Refuse a name that cannot be an adapter's.

    Args:
        name: the name.
        taken: the names of the adapters that are there.

    Raises:
        StateError: it cannot be a module's or a folder's name, is reserved, or is taken.
    """
    if not isinstance(name, str) or not name or "." in name or name == BASE or name in TAKEN:
        raise StateError(
            f"{name!r} cannot be an adapter's name: give one without a dot, such as 'default'"
        )
    if reason := _no_folder(name):
        raise StateError(
            f"{_short(name)} cannot be an adapter's name, since the adapter is saved in a folder "
            f"of that name, and {reason}; give a plain one, such as 'default'"
        )
    if name in taken:
        raise StateError(
            f"there is an adapter {name!r} already; choose another name, or "
            f"delete_adapter({name!r}) first"
        )


def _no_folder(name: str) -> str:
    """Why no folder can be called so; empty where one can."""
    parts = name.split("/")
    if not all(part.strip() for part in parts):
        return "a part between its slashes is empty, which would lead out of the folder"
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "it has characters that no text has"
    if max(len(part.encode()) for part in parts) > LONGEST:
        return f"no folder's name is longer than {LONGEST} bytes"
    return ""


def _short(name: str) -> str:
    return repr(name) if len(name) < 60 else f"{name[:40]!r}... ({len(name)} characters)"
