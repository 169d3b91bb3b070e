"""Being ``peft``: ``import peft``, its submodules and its version resolve to this library."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType
from typing import Any

from ..config import FORMAT_VERSION
from ..errors import POLICY, GraftworkError
from .exports import EXPORTS, MODULES
from .facts import LAYER_NAMES
from .names import NAMES, REFUSED
from .transformers import watch
from .wording import worded


def become_peft() -> ModuleType:
    """Make ``import peft`` mean this library in this process.

    What PEFT only warns about (a pattern that matches nothing beside others that do, a tensor that
    a file lacks) stays a warning from now on, one that says what did not take effect.

    Raises:
        GraftworkError: the real peft has been imported already.
    """
    found = sys.modules.get("peft")
    if isinstance(found, Alias):
        return found
    if found is not None:
        raise GraftworkError(
            f"the real peft has been imported already, from {getattr(found, '__file__', '?')}, and "
            "classes of it may be in use. Call graftwork.as_peft() before the first import of "
            "peft, transformers.trainer or accelerate, at the top of the program, or run it with: "
            "python -m graftwork.as_peft program.py"
        )
    sys.meta_path.insert(0, _Finder())
    POLICY.lenient, POLICY.words = True, worded
    _forget_availability()
    watch("transformers.integrations.peft", teach_loading)
    import_module("graftwork.interop.surface").install()
    return import_module("peft")


class Alias(ModuleType):
    """A module of PEFT whose contents are this library's."""

    def __getattr__(self, name: str) -> Any:
        if f"{self.__name__}.{name}" in MODULES:
            return import_module(f"{self.__name__}.{name}")
        if name == "__version__" and self.__name__ == "peft":
            return shown_version()
        place = self._place(name)
        if place is not None:
            where, ours = place
            value = getattr(import_module(f"graftwork.{where}"), ours)
            setattr(self, name, value)
            return value
        if name.startswith("__"):
            raise AttributeError(name)
        why = REFUSED.get(name)
        remedy = f"in place of it: {why}" if why else "this program needs the real peft for it"
        raise AttributeError(
            f"graftwork, which stands in for peft here, has no {self.__name__}.{name}; {remedy}"
        )

    def _place(self, name: str) -> tuple[str, str] | None:
        """Where a name is here: each package of tuners has a ``Linear`` of its own."""
        package = [*self.__name__.split("."), "", ""][2]
        if name in LAYER_NAMES.get(package, ()):
            return "interop.classes", f"{package}.{name}"
        return NAMES.get(name)

    def __dir__(self) -> Iterable[str]:
        return sorted({*super().__dir__(), *NAMES})


class _Finder(DistributionFinder):
    """Finds the modules of the alias, and its distribution."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith("peft."):
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(
                f"graftwork, which stands in for peft here, has no module {fullname}; this "
                "program needs the real peft for it",
                name=fullname,
            )
        return importlib.machinery.ModuleSpec(fullname, _Loader(), is_package=True)

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        if context is not None and (context.name or "").lower() == "peft":
            yield _Distribution()


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Alias(spec.name, f"graftwork, standing in for {spec.name}")

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in EXPORTS:
            module.__dict__["__all__"] = list(EXPORTS[module.__name__])


class _Distribution(Distribution):
    """Metadata of the PEFT release whose surface and files are offered."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: peft\nVersion: {shown_version()}\n"
        return None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"graftwork stands in for peft, which has no file {path}")


def shown_version() -> str:
    """The version that checks see: of the files' format, or what the loaded transformers asks for.

    transformers raises its least version of peft with each release, also where the names that it
    uses stay the same.
    """
    table: Any = sys.modules.get("transformers.dependency_versions_table")
    asked: list[str] = re.findall(
        r"\d+(?:\.\d+)+", "" if table is None else table.deps.get("peft", "")
    )
    return max([FORMAT_VERSION, *asked], key=lambda v: tuple(map(int, v.split("."))))


def teach_loading(module: ModuleType) -> None:
    """Let transformers' own ``load_adapter`` find this library's parameters."""
    from .native import teach

    teach(module)


def _forget_availability() -> None:
    """transformers remembers whether peft was there when it first looked."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for name in ("_is_package_available", "is_peft_available", "is_peft_greater_or_equal"):
        if utils is not None and hasattr(getattr(utils, name, None), "cache_clear"):
            getattr(utils, name).cache_clear()
