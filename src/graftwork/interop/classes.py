"""PEFT's classes of layers and tuners, for ``isinstance``: one host stands for all of them."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn

from ..engine.host import Host
from ..engine.module import PARAM, ModuleHost
from ..engine.ties import Tied
from ..engine.tree import inside
from ..parts.tokens import Tokens
from ..parts.whole import Bias, Copy, Whole
from .facts import AROUND, LAYER_NAMES, QUANTISED


def methods_at(host: Host) -> dict[str, Any]:
    """The methods whose own parts are at a layer, each with one of those parts."""
    found: dict[str, Any] = {}
    for name in host.adapters:
        config = host.switch.configs.get(name)
        for key, part in host.parts_of(name) if config is not None else ():
            method = config.method  # type: ignore[union-attr]
            if is_own(key, part) or key == method.lower():
                found.setdefault(method, part)
    return found


def is_own(key: str, part: Any) -> bool:
    """Whether a part is its method's, and not one that a config brings along."""
    if isinstance(part, Tied):
        part = part.source[0]
    beside = isinstance(part, (Bias, Whole)) or (isinstance(part, Tokens) and part.prefix)
    return not beside and not (isinstance(part, Copy) and key == "copy")


class Kind(type):
    """A class of PEFT's layers: its instances are the hosts that have such a part."""

    methods: frozenset[str]  # empty: any
    around: frozenset[str] | None  # names of the layers' classes; None: any

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, Host):
            return False
        if not len(instance.adapters):
            return not cls.methods and cls.around is None
        found = methods_at(instance)
        if not found or (cls.methods and not cls.methods.intersection(found)):
            return False
        if cls.around is None:
            return True
        kinds = {kind.__name__ for kind in type(inside(instance)).__mro__}
        if not cls.around:
            return at_parameters(instance)
        plain = not cls.around.issubset(_PLAIN) or kinds.isdisjoint(_PACKED)
        return plain and not cls.around.isdisjoint(kinds)

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"{cls.__name__} is what a layer with an adapter is an instance of, and is not made by "
            "itself: get_peft_model(model, config) or inject_adapter_in_model(config, model)"
        )


_PLAIN = frozenset(AROUND["Linear"].split())
_PACKED = frozenset(" ".join(QUANTISED.values()).split())


def at_parameters(host: Host) -> bool:
    if not isinstance(host, ModuleHost) or type(inside(host)) is nn.MultiheadAttention:
        return False
    keys = [key for name in host.adapters for key, _ in host.parts_of(name)]
    return any(key.startswith(PARAM) for key in keys)


class BaseTunerLayer(metaclass=Kind):
    """PEFT's base of its layers: a host in which a method acts."""

    methods: frozenset[str] = frozenset()
    around: frozenset[str] | None = None


class LycorisLayer(BaseTunerLayer):
    """PEFT's base of LoHa's and LoKr's layers."""

    methods = frozenset(("LOHA", "LOKR"))


@functools.cache
def layer_class(package: str, name: str) -> Any:
    """PEFT's class ``name`` of ``peft.tuners.<package>``."""
    first, *others = LAYER_NAMES[package]
    doc = f"A host as PEFT's ``{name}`` of ``peft.tuners.{package}``."
    space: dict[str, Any] = {"__doc__": doc, "__module__": f"peft.tuners.{package}.layer"}
    if name == first:
        methods = {package.upper()} | ({"ADALORA"} if package == "lora" else set())
        above: Any = LycorisLayer if package in ("loha", "lokr") else BaseTunerLayer
        above = layer_class("lora", "LoraLayer") if package == "adalora" else above
        return Kind(name, (above,), {**space, "methods": frozenset(methods)})
    assert name in others, name
    ends = [end for end in AROUND if name.removesuffix("Layer").endswith(end)]
    around = frozenset(AROUND[max(ends, key=len)].split())
    # AdaLoRA's layers are classes of their own, not LoRA's
    own = {"methods": frozenset({"LORA"}), "around": around}
    return Kind(name, (layer_class(package, first),), {**space, **(own if package == "lora" else
                {"around": around})})  # fmt: skip


def class_name(host: Host) -> str:
    """The module and class that PEFT's report has for a layer, such as ``lora.Linear``."""
    for method in methods_at(host):
        package = method.lower()
        for name in LAYER_NAMES.get(package, ())[:0:-1] or LAYER_NAMES.get(package, ()):
            if isinstance(host, layer_class(package, name)):
                return name if name == "TrainableTokensLayer" else f"{package}.{name}"
    return type(host).__name__


class _Having(type):
    wanted: tuple[bool, bool]  # a copy of the module; rows of it
    __call__ = Kind.__call__

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, Host):
            return False
        copies, rows = cls.wanted
        for name in instance.adapters:
            for key, part in instance.parts_of(name):
                part = part.source[0] if isinstance(part, Tied) else part
                if copies and isinstance(part, Copy) and not is_own(key, part):
                    return True
                if rows and isinstance(part, Tokens) and part.prefix:
                    return True
        return False


class AuxiliaryTrainingWrapper(metaclass=_Having):
    """PEFT's base of the next two."""

    wanted = (True, True)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A host in which an adapter trains a whole module."""

    wanted = (True, False)


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A host in which an adapter trains rows of an embedding beside its method."""

    wanted = (False, True)


def __getattr__(name: str) -> Any:
    package, _, layer = name.partition(".")
    if layer:
        return layer_class(package, layer)
    raise AttributeError(name)
