"""Tensors under PEFT's names, which are made from their owners and never taken apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.adapter import Adapter, Part
from ..engine.host import Host
from ..engine.inject import switch_of
from ..engine.tree import hosts, inside, walk
from ..errors import POLICY, FileError, nearest, warn
from ..fast import shards
from ..fast.shards import sharding
from ..fast.tensors import materialise
from .align import beside

PREFIX = "base_model.model."
ROOT = "base_model."  # in front of what an adapter keeps once for the whole model
MARK = "."  # in front of such a name here: no module's path begins so
BARE = ".."  # in front of a name that a file holds as it is


@dataclass
class LoadReport:
    """What became of the tensors of a file.

    ``missing`` are names that the adapter has and the file lacks, ``unexpected`` the other way
    round, ``reshaped`` those with another shape, ``renamed`` those that were found under another
    name.
    """

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def missing_keys(self) -> list[str]:
        return self.missing

    @property
    def unexpected_keys(self) -> list[str]:
        return self.unexpected

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} tensors match"]
        for title, names, others in (
            ("missing in the file", self.missing, self.unexpected),
            ("in the file, but not in the adapter", self.unexpected, self.missing),
            ("with another shape", self.reshaped, []),
        ):
            if names:
                lines.append(f"{len(names)} {title}:")
                lines += [f"  {name:.300}{_near(name, others)}" for name in names[:8]]
                lines += [f"  ... and {len(names) - 8} more"] if len(names) > 8 else []
        return "\n".join(lines)


@dataclass
class Owned:
    """One part of an adapter in a model, and the front of its names in a file."""

    part: Part
    front: str
    config: Any  # resolved for the part's path

    @cached_property
    def expects(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors in a file."""
        return self.part.expects(self.config)


def owned(model: nn.Module, name: str, config: Any = None) -> list[Owned]:
    """The parts of an adapter; ``config`` is that of the file where it is not the adapter's own."""
    found = []
    for path, host in hosts(model).items():
        if name not in host.adapters._modules:
            continue
        own = config or host.switch.configs[name]
        front = MARK if own.is_prompt_learning else ""
        for key, part in host.parts_of(name):
            site = host.site_of(key)
            at = own.at(path, site.parameter if site else "weight")
            found.append(Owned(part, f"{front}{path}.{part.prefix}", at))
        if (shared := host.shared_of(name)) is not None:
            found.insert(
                0, Owned(shared, BARE if front else MARK, own)
            )  # the parts may build on what it holds
    return found


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, none of them in the memory of another: what layers share is repeated."""
    seen: set[tuple[int, torch.Size]] = set()
    out = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        out[name] = tensor.clone() if key in seen and not tensor.is_meta else tensor
        seen.add(key)
    return out


def full(plain: str, wrapped: bool = True) -> str:
    """The name in a file; ``wrapped``: of a model with a wrapper around it."""
    if plain.startswith(BARE):
        return plain.removeprefix(BARE)
    if plain.startswith(MARK):
        return (ROOT if wrapped else "") + plain.removeprefix(MARK)
    return (PREFIX if wrapped else "") + plain


def whole(
    model: nn.Module,
    parts: list[Owned],
    values: Mapping[str, Tensor] | None = None,
    write: bool = False,
) -> Any:
    """A context in which parts hold whole tensors; see ``fast.shards.whole``."""
    every = [o.part for o in parts]
    if values is None and not sharding(every):
        return nullcontext()
    return shards.whole(model, every, values, write)


def state(
    model: nn.Module, name: str, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's names, without ``base_model.model.``.

    Args:
        model: the user's model.
        name: the adapter.
        values: tensors that somebody has gathered, under the names of a state dict of ``model``.

    Raises:
        StateError: a tensor is in parts that nobody here can gather.
    """
    out: dict[str, Tensor] = {}
    parts = owned(model, name)
    with whole(model, parts, values):
        for o in parts:
            for key, tensor in o.part.file_tensors().items():
                plain = o.front + key
                assert plain not in out, f"two tensors would be saved as {plain}"
                out[plain] = tensor.detach()
    return out


def expected(parts: list[Owned]) -> dict[str, tuple[Owned, str, tuple[int, ...]]]:
    """File name -> the part that owns it, its key there, and its shape in the file."""
    return {o.front + key: (o, key, shape) for o in parts for key, shape in o.expects.items()}


def compare(
    model: nn.Module,
    parts: list[Owned],
    tensors: Mapping[str, Any],
    key_mapping: Mapping[str, str] | None = None,
) -> tuple[LoadReport, dict[str, str]]:
    """How a file fits an adapter, without loading it; also, name in the adapter -> name in the
    file.

    Args:
        model: the user's model.
        parts: the adapter's parts.
        tensors: the file: anything with a ``shape`` by name.
        key_mapping: regex -> replacement, for the names of a model that was built otherwise.
    """
    want, report, found = expected(parts), LoadReport(), {}
    names = None if key_mapping else _as_written(want, tensors)
    names = names or {key: renamed(key, key_mapping, want) for key in tensors}
    known = want.keys() >= set(names.values())
    base = {} if known else _embeddings(model, tensors, want)
    for key, plain in names.items():
        if plain in want or plain in base:
            found[plain] = key
            if key not in (full(plain), full(plain, wrapped=False)):
                report.renamed[key] = plain
            shape = want[plain][2] if plain in want else tuple(base[plain].shape)
            if tuple(tensors[key].shape) != tuple(shape):
                report.reshaped.append(
                    f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(shape)} in the model"
                )
            else:
                report.matched.append(key)
        elif not _double(plain, parts):
            report.unexpected.append(key)
    report.missing = [full(key) for key in want if key not in found]
    return report, found


def _as_written(want: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, str] | None:
    """File name -> name in the adapter, where a file has just the names that would be written now:
    then a path that begins as a wrapper's does is not mistaken for one.
    """
    for wrapped in (True, False):
        names = {full(plain, wrapped): plain for plain in want}
        if names.keys() == tensors.keys():
            return {key: names[key] for key in tensors}
    return None


def judge(
    report: LoadReport, where: str, strict: bool, hint: Callable[[], str] = lambda: ""
) -> None:
    """Stop where a file does not fit, or say so; ``hint`` finds a reason.

    Raises:
        FileError: a tensor is missing, unexpected or of another shape, and ``strict``.
    """
    if report.ok:
        return
    text = f"{where} does not fit this adapter and model{hint()}:\n{report}"
    missing = [name.removeprefix(PREFIX) for name in report.missing]
    if sides := beside([name.removeprefix(PREFIX) for name in report.unexpected], missing):
        text += f"\nThe names that differ, numbers as *:\n{sides}"
    if strict and not POLICY.lenient:
        raise FileError(f"{text}\nNothing was loaded. To load what fits, pass strict='warn'.")
    if report.reshaped:
        raise FileError(text)
    if report.missing:
        text = f"Found missing adapter keys while loading the checkpoint: {report.missing}.\n{text}"
    warn(f"{text}\nThose tensors did not take effect")


@torch.no_grad()
def fill(
    model: nn.Module,
    parts: list[Owned],
    tensors: Mapping[str, Tensor],
    found: Mapping[str, str],
    resumed: Part | None = None,
) -> None:
    """Give the parts the values of a file that was compared before, all but ``resumed``."""
    by_part: dict[int, tuple[Owned, dict[str, Tensor]]] = {}
    want = expected(parts)
    for plain, (o, key, _) in want.items():
        if plain in found:
            by_part.setdefault(id(o), (o, {}))[1][key] = tensors[found[plain]]
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    for o in parts:  # also those that share what others take
        materialise(o.part, device)
    for o, values in by_part.values():
        if o.part is not resumed:
            o.part.take(values, o.config)
    owned = carried(model, parts, tensors, found)
    switch = switch_of(model) if owned else None
    with nullcontext() if switch is None else switch.turns.change(None):
        for plain, weight in owned.items():
            shards.fill(weight, tensors[found[plain]])


def carried(
    model: nn.Module, parts: list[Owned], tensors: Mapping[str, Any], found: Mapping[str, str]
) -> dict[str, Tensor]:
    """The base's own weights that a file has values for, by name."""
    want = expected(parts)
    every = {} if want.keys() >= found.keys() else _embeddings(model, tensors, want)
    return {
        plain: weight
        for plain, weight in every.items()
        if plain in found and weight.shape == tensors[found[plain]].shape
    }


def renamed(key: str, key_mapping: Mapping[str, str] | None, want: Mapping[str, Any] = {}) -> str:
    """A file's name as it is here; ``want``: the names of the adapter."""
    plain = key.removeprefix(PREFIX)
    if plain in want and not key_mapping:
        return plain
    for pattern, replacement in (key_mapping or {}).items():
        new, count = re.subn(pattern, replacement, plain)
        if count:
            return new
    # transformers puts PREFIX in front of every name
    roots = MARK + key.removeprefix(ROOT), BARE + key, MARK + plain, BARE + plain
    return next((name for name in roots if name in want), plain)


def _embeddings(
    model: nn.Module, tensors: Mapping[str, Any], owned: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The base's embedding and output weights that a file carries (resized vocabulary).

    ``owned`` are names of the adapter's own tensors: a trained copy of the output layer is no base.
    """
    found = {}
    wanted = {id(inside(layer)) for layer in embedding_layers(model)}
    for path, module in walk(model):
        if id(inside(module)) in wanted:
            weight = (
                module.pristine("weight")
                if isinstance(module, Host)
                else inside(module)._parameters["weight"]
            )
            for plain in (f"{path}.weight", f"{path}.base_layer.weight"):
                carried = plain in tensors or PREFIX + plain in tensors
                if carried and plain not in owned:
                    found[plain] = weight
    return found  # type: ignore[return-value]


def embedding_layers(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output layer, where the model has them."""
    layers = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter = getattr(model, name, None)
        try:
            layer = getter() if callable(getter) else None
        except NotImplementedError:  # transformers' answer of a model without one
            layer = None
        if layer is not None and "weight" in inside(layer)._parameters:
            layers.append(layer)
    return layers


def _double(plain: str, parts: list[Owned]) -> bool:
    """PEFT with bias='all' writes the biases of a saved module two times more."""
    fronts = {o.front for o in parts if isinstance(o.part, Adapter) and o.part.instead()}
    return any(
        plain.startswith(f + inner)
        for f in fronts
        for inner in ("original_module.", "modules_to_save.")
    ) and plain.endswith(".bias")


def _near(name: str, others: list[str]) -> str:
    near = nearest(name, others, 1, 0.8)
    return f"  (nearest: {near[1:-1]})" if near else ""
