"""transformers' Trainer recognises a ``PeftModel`` by its class. Here it learns to recognise ours
as well.

With the real peft installed or not, and whichever library is imported first: modules that are
loaded are changed now, modules that are not are changed when they are.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

# a module of transformers -> what is changed in it
WATCHED: dict[str, Callable[[ModuleType], None]] = {}


def recognise() -> None:
    """Let transformers' Trainer treat this library's models as PEFT's."""
    watch("transformers.trainer_utils", _teach)
    watch("transformers.trainer", _teach)


def watch(name: str, change: Callable[[ModuleType], None]) -> None:
    """Change a module now where it is loaded, else as soon as it is."""
    if importlib.util.find_spec("transformers") is None:
        return
    WATCHED[name] = change
    if name in sys.modules:
        change(sys.modules[name])
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _teach(module: ModuleType) -> None:
    from ..model.peft_model import PeftModel
    from ..model.tasks import PeftMixedModel

    if "is_peft_available" not in module.__dict__:  # still being imported
        return
    for name, ours in (("PeftModel", PeftModel), ("PeftMixedModel", PeftMixedModel)):
        theirs = module.__dict__.get(name, ())
        if ours is not theirs and not (isinstance(theirs, tuple) and ours in theirs):
            both = (theirs, ours) if theirs else ours  # isinstance takes nested tuples
            setattr(module, name, both)
    module.__dict__["is_peft_available"] = _yes


def _yes() -> bool:
    return True


class _Watch(importlib.abc.MetaPathFinder):
    """Changes a watched module as soon as it has been imported."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        WATCHED[module.__name__](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def checkpointing(model: Any) -> bool:
    """Whether reentrant checkpointing was on before, in a model of transformers, so that gradients
    must flow out of frozen embeddings; the other kind needs none there, and would compute them for
    every block below the adapters. Asked while there are no hosts, through which it would look.
    """
    new = hasattr(type(model), "is_activation_checkpointing")  # transformers' name since 5.2x
    on = getattr(model, f"is_{'activation' if new else 'gradient'}_checkpointing", False)
    able = bool(on) and hasattr(model, "enable_input_require_grads")
    return able and any(map(_reentrant, model.modules()))


def _reentrant(module: Any) -> bool:
    """Whether a block is checkpointed by torch's older kind, or may be."""
    function: Any = getattr(module, "_gradient_checkpointing_func", None)
    return bool(function) and getattr(function, "keywords", {}).get("use_reentrant", True)
