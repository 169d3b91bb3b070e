"""The names of peft's modules, with what each is: ``peft FILE`` of the real one, ``alias FILE`` of
this library in its place, asked for the names in FILE.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import pkgutil
import sys
import types
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")


def names_of(package: Any) -> dict[str, list[str]]:
    """Every module of the real peft that can be imported here, and its public names."""
    found = {"peft": sorted({*package.__all__, "__version__"})}
    for one in pkgutil.walk_packages(package.__path__, "peft."):
        try:
            module = importlib.import_module(one.name)
        except ImportError:  # needs a package that is not installed
            continue
        exported = set(getattr(module, "__all__", ()))
        own = {n for n, v in vars(module).items() if not n.startswith("_") and _belongs(v)}
        found[one.name] = sorted(exported | own)
    return found


def _belongs(value: Any) -> bool:
    if inspect.ismodule(value):
        return False
    home = getattr(value, "__module__", None)
    if inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "cache_info"):
        return str(home).startswith("peft")
    if home in ("typing", "__future__", "typing_extensions"):
        return False
    return not str(type(value)).startswith("<class 'typing")


def described(value: Any) -> dict[str, Any]:
    """Kind, and what programs can rely on."""
    if inspect.isclass(value):
        out: dict[str, Any] = {"kind": "class"}
        if issubclass(value, enum.Enum):
            out["members"] = {m.name: m.value for m in value}
        elif issubclass(value, BaseException):
            out["bases"] = [b.__name__ for b in value.__mro__ if b.__module__ == "builtins"]
        else:
            out["arguments"] = _arguments(value)
        return out
    if callable(value):
        return {"kind": "function", "arguments": _arguments(value)}
    return {"kind": "value", "type": type(value).__name__, "value": _plain(value)}


def _arguments(value: Any) -> list[list[Any]] | None:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[p.name, p.kind.name, _default(p.default)] for p in parameters]


def _default(value: Any) -> Any:
    if value is inspect.Parameter.empty:
        return "<required>"
    return value if isinstance(value, (str, int, float, bool, type(None))) else "<some>"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if inspect.isclass(value) or isinstance(value, types.FunctionType):
        return value.__name__
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def main(which: str, file: Path) -> None:
    """Describe all names, or those that the other run has left in the file."""
    if which == "alias":
        import graftwork

        graftwork.as_peft()
    import peft

    wanted = names_of(peft) if which == "peft" else json.loads(file.read_text())
    report: dict[str, Any] = {}
    for module_name, names in wanted.items():
        module = importlib.import_module(module_name)
        exported = getattr(module, "__all__", None)
        own: dict[str, Any] = {"__all__": sorted(exported) if exported else None}
        for name in names:
            try:
                own[name] = described(getattr(module, name))
            except AttributeError as error:
                own[name] = {"kind": "absent", "why": str(error)}
        report[module_name] = own
    if which == "peft":
        file.write_text(json.dumps({m: list(v) for m, v in wanted.items()}))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
