"""PEFT's tree of modules, for ``as_peft()``: ``named_parameters()``, ``named_modules()`` and
``state_dict()`` of a model give PEFT's names, ``base_model.model.….lora_A.default.weight``.

A host shows the modules that PEFT would have there; what it owns stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..engine.adapter import Shared
from ..engine.host import Host
from ..engine.ties import Tied
from ..fast.tensors import lasting
from ..methods.adalora import AdaLoRA
from ..parts.tokens import Tokens
from ..parts.whole import Bias, Copy, Whole
from .classes import is_own
from .facts import kinds_of
from .views import (
    Home,
    Modules,
    Shown,
    changed,
    container,
    letter,
    ranknum,
)

TOKENS = "token_adapter"
EMPTY: dict[str, type[nn.Module]] = {  # what PEFT has where an option is off
    "gralora_A_general": nn.Identity,
    "gralora_B_general": nn.Identity,
    "peanut_encoders": nn.ModuleList,
    "peanut_decoders": nn.ModuleList,
}


@dataclass
class Entry:
    """A tensor of an adapter under PEFT's name."""

    wrapper: str  # where the wrapper that PEFT has stands, below the layer
    attribute: str
    adapter: str
    rest: str
    tensor: Tensor
    home: Home | None
    kind: str
    inner: str | None  # its name in the host, where the host owns it

    @property
    def name(self) -> str:
        """The name below the layer."""
        return ".".join(n for n in (self.wrapper, self.attribute, self.adapter, self.rest) if n)


def entries(host: Host) -> Iterator[Entry]:
    """The tensors of all adapters at a layer, but for copies and for the base's own."""
    for name in host.adapters:
        kinds = kinds_of(host.switch.configs[name].method) if name in host.switch.configs else {}
        every = host.parts_of(name)
        for i, (key, part) in enumerate(every):
            if isinstance(part, (Copy, Bias, Whole)):
                continue
            front, inside = f"adapters.{name}.{key}", ""
            if isinstance(part, Tied):
                beneath = any(not isinstance(other, (Tied, Copy)) for _, other in every[i + 1 :])
                inside = "base_layer." if beneath else ""
                turned, part, front = part.transposed, part.source[0], ""
                if turned and not isinstance(part, Tokens):
                    continue
            rows = isinstance(part, Tokens)
            wrapper = f"{inside}{TOKENS}" if rows and part.prefix else part.prefix.rstrip(".")
            known = kinds_of("TRAINABLE_TOKENS") if rows else kinds
            fronts = {id(part): front, id(part.shared): _place(host, name, part.shared)}
            for k, home, tensor in (*_tensors(part), *_common(part, known)):
                first = fronts.get(id(home[0]))
                inner = f"{first}.{home[1]}" if first else None
                yield _entry(wrapper, k, name, tensor, home, known, inner)
            if isinstance(part, AdaLoRA):
                yield Entry(wrapper, "ranknum", name, "", ranknum(part), None, "P", None)


def _entry(
    wrapper: str, key: str, name: str, tensor: Tensor, home: Home, kinds: Any, inner: str | None
) -> Entry:
    attribute, _, rest = key.partition(".")
    kind = kinds[attribute] if attribute in kinds else letter(tensor, rest)
    if kind == "M" and not rest:
        rest = "weight"
    if kind in ("M", "P") and not isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        tensor = nn.Parameter(tensor, requires_grad=False)  # frozen, a parameter in PEFT
    return Entry(wrapper, attribute, name, rest, tensor, home, kind, inner)


def _tensors(part: Any) -> Iterator[tuple[str, Home, Tensor]]:
    """PEFT's name in a file, the owner, and the tensor itself, of each lasting one."""
    own: dict[int, tuple[Home, Tensor]] = {id(t): ((part, n), t) for n, t in lasting(part)}
    shared = part.shared
    if shared is not None:
        own |= {id(t): ((shared, n), t) for n, t in lasting(shared)}
    left = dict(lasting(part))
    if not part.keys:
        for key, tensor in part.file_tensors().items():
            if (found := own.get(id(tensor))) is not None:
                left.pop(found[0][1], None)
                yield key, *found
    for local, tensor in left.items():
        if local in part.keys:
            yield part.keys[local], (part, local), tensor


def _common(part: Any, kinds: dict[str, str]) -> Iterator[tuple[str, Home, Tensor]]:
    """What all layers of an adapter share and PEFT shows at each."""
    for local, tensor in lasting(part.shared) if part.shared is not None else ():
        key = part.shared.keys.get(local, "")
        if kinds.get(key.partition(".")[0]):
            yield key, (part.shared, local), tensor


def held(host: Host) -> Iterator[tuple[str, Shared]]:
    """What all layers of an adapter share and this one holds, where PEFT's tree shows it."""
    for name in host.adapters:
        config = host.switch.configs.get(name)
        if config is not None and any(kinds_of(config.method).values()):
            for key, module in host.adapters[name]._modules.items():
                if isinstance(module, Shared):
                    yield f"adapters.{name}.{key}", module


def _place(host: Host, name: str, shared: nn.Module | None) -> str:
    for key, module in host.adapters[name]._modules.items():
        if module is shared:
            return f"adapters.{name}.{key}"
    return ""


@dataclass
class Shape:
    """What PEFT has at a layer's path: a module and its children; ``base``: where the user's own
    modules stand below it, in PEFT's words and in the host's.
    """

    module: nn.Module
    children: dict[str, nn.Module] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    own: list[Entry] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)  # the host's tensors that PEFT shows nowhere
    covered: set[str] = field(default_factory=set)  # those of its adapters that are shown


class _Builder:
    def __init__(self, host: Host) -> None:
        every = list(entries(host))
        self.host, self.own = host, [entry for entry in every if entry.kind]
        self.unnamed = [entry for entry in every if not entry.kind]
        self.wrappers: dict[str, list[Entry]] = {}
        for entry in self.own:
            self.wrappers.setdefault(entry.wrapper, []).append(entry)
        self.copies: dict[str, dict[str, nn.Module]] = {}
        self.swapped: dict[str, dict[str, Tensor]] = {}  # path -> the base's parameters that train
        self.names: dict[str, str] = {}
        for name in reversed([*host.switch.active, *host.adapters]):
            for key, part in host.parts_of(name):
                self._take(name, key, part)
        for attribute in self.copies:
            if attribute != "modules_to_save":
                self.wrappers.setdefault("", [])
        self.base: dict[str, str] = {}

    def _take(self, name: str, key: str, part: Any) -> None:
        if isinstance(part, Copy):
            tuner = key == self.host.switch.configs[name].method.lower()
            attribute = "ln_tuning_layers" if tuner else "modules_to_save"
            self.copies.setdefault(attribute, {})[name] = part.module
            self.names[f"{attribute}.{name}"] = f"adapters.{name}.{key}.module"
        elif isinstance(part, (Bias, Whole)):
            local, file = next(iter(part.keys.items()))
            front, _, leaf = (part.prefix + file).rpartition(".")
            self.swapped.setdefault(front, {})[leaf] = getattr(part, local)
            full = f"{front}.{leaf}" if front else leaf
            self.names[full] = f"adapters.{name}.{key}.{local}"

    def shape(self) -> Shape:
        """The host's."""
        host = self.host
        module: nn.Module = host
        if "" in self.wrappers:
            children = self.wrapped("")
        elif TOKENS in self.wrappers:
            children = {TOKENS: self.node(TOKENS)}
        elif self.copies:
            children = {"original_module": self.bare("original_module")}
        elif self.tuned():
            children = {"base_layer": self.bare("base_layer")}
        else:
            module = self.bare("")
            children = {n: m for n, m in module._modules.items() if m is not None}
        for attribute, copies in self.copies.items():
            children[attribute] = Modules(attribute, copies)
        shape = Shape(module, children, self.base, self.own, self.names)
        shape.hidden = [e.inner for e in self.unnamed if e.inner]
        shape.covered = {e.inner for e in self.own if e.inner} | {
            *shape.hidden,
            *self.names.values(),
        }
        for front, own in self.swapped.items():
            where = self.base[front]
            shape.hidden += [f"{where}.{leaf}" for leaf in own]
        for front, shared in held(host):
            own_names = {n for n, _ in lasting(shared, f"{front}.")}
            shape.hidden += sorted(own_names - shape.covered)
            shape.covered |= own_names
        return shape

    def tuned(self) -> bool:
        """Whether a method acts here that PEFT has layers for, and not biases or prompts alone."""
        configs = self.host.switch.configs
        layered = [n for n, c in configs.items() if not c.is_prompt_learning]
        parts = [pair for n in layered if n in self.host.adapters for pair in self.host.parts_of(n)]
        return any(is_own(*pair) for pair in parts)

    def node(self, path: str) -> nn.Module:
        """A wrapper that PEFT has below the layer, or the user's own module there."""
        rows = f"{path}.{TOKENS}"
        if path not in self.wrappers and rows not in self.wrappers:
            return self.bare(path)
        wrapper = Shown()
        children = self.wrapped(path) if path in self.wrappers else {TOKENS: self.node(rows)}
        wrapper._modules.update(children)
        return wrapper

    def wrapped(self, path: str) -> dict[str, nn.Module]:
        """The children of a wrapper: the layer beneath, and a container for each name."""
        beneath = f"{path}.base_layer" if path else "base_layer"
        children = {"base_layer": self.node(beneath)}
        if not path and TOKENS in self.wrappers:
            children[TOKENS] = self.node(TOKENS)
        found: dict[str, dict[str, dict[str, tuple[Tensor, Home | None]]]] = {}
        kinds = self.kinds(path)
        for entry in self.wrappers[path]:
            kinds.setdefault(entry.attribute, entry.kind)
            own = found.setdefault(entry.attribute, {}).setdefault(entry.adapter, {})
            own[entry.rest] = (entry.tensor, entry.home)
        layer = self.host.base_layer
        for attribute, kind in kinds.items():
            if attribute.endswith("_dropout") and kind == "M":
                children[attribute] = Modules(attribute, self.dropouts(path))
            elif kind and attribute not in self.copies:
                children[attribute] = container(kind, attribute, found.get(attribute, {}), layer)
                empty = EMPTY.get(attribute)
                for name in {e.adapter for e in self.wrappers[path]} if empty else ():
                    children[attribute]._modules.setdefault(name, empty())  # type: ignore[misc]
        return children

    def kinds(self, path: str) -> dict[str, str]:
        """The containers that PEFT's layers of these methods always have."""
        if path.endswith(TOKENS):
            return {}
        configs = self.host.switch.configs
        methods = {configs[e.adapter].method for e in self.wrappers[path] if e.adapter in configs}
        return {n: kind for m in sorted(methods) for n, kind in kinds_of(m).items() if kind}

    def dropouts(self, path: str) -> dict[str, nn.Module]:
        """The dropout of each adapter."""
        found: dict[str, nn.Module] = {}
        for name in self.host.adapters:
            for _, part in self.host.parts_of(name):
                own = part.__dict__.get("dropout", part._modules.get("dropout"))
                if (
                    not isinstance(part, (Copy, Bias, Whole, Tied))
                    and part.prefix.rstrip(".") == path
                ):
                    found[name] = own if isinstance(own, nn.Module) else nn.Identity()
        return found

    def bare(self, path: str) -> nn.Module:
        """The user's own module at a path of PEFT's, with what has changed in it or below it."""
        names = [n for n in path.split(".") if n not in ("base_layer", "original_module", TOKENS)]
        inner = ".".join(n for n in names if n)
        module: nn.Module = self.host.base_layer.get_submodule(inner)
        below: dict[str, nn.Module] = {}
        front = f"{path}." if path else ""
        for other in (*self.wrappers, *self.swapped):
            child = other.removeprefix(front).partition(".")[0]
            if other.startswith(front) and child in module._modules and other != path:
                below[child] = self.node(front + child)
        self.base[path] = f"base_layer.{inner}" if inner else "base_layer"
        return changed(module, self.swapped.get(path, {}), below)


class Kept:
    """The shape of a host as it was last seen; a copy of the host makes its own."""

    def __init__(self) -> None:
        self.key: Any = None
        self.held: Any = None
        self.shape: Shape | None = None

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def _gather(module: nn.Module, held: list[Any]) -> None:
    """A module, its tensors, and those below; without a generator for each level."""
    held.append(module)
    held += module._parameters.values()
    held += module._buffers.values()
    for child in module._modules.values():
        if child is not None:
            _gather(child, held)


def shape(host: Host) -> Shape:
    """PEFT's shape of a host; made again where its adapters or their tensors have changed."""
    kept = host.__dict__.get("_peft_shape")
    if kept is None:
        kept = host.__dict__["_peft_shape"] = Kept()
    held: list[Any] = []
    _gather(host.adapters, held)
    _gather(host.base_layer, held)
    for name in host.adapters._modules:
        for _, part in host.parts_of(name):
            if (shared := part.shared) is not None:
                held += [shared, *shared._parameters.values()]
    key = list(map(id, held)), tuple(host.adapters._modules), host.switch.active
    if kept.key != key:
        kept.shape, kept.key, kept.held = _Builder(host).shape(), key, held
    assert kept.shape is not None
    return kept.shape
