"""A vocabulary that has grown: whether an adapter's file needs the base's tables, and giving a base
model the rows that a file was saved with.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig
from ..engine.host import Host
from ..engine.inject import switch_of
from ..engine.switch import Switch
from ..engine.ties import Tied
from ..engine.tree import hosts, inside, mark, walk
from ..errors import StateError
from ..fast import shards
from ..files import codec
from ..files.bounded import read_json
from ..parts.tokens import Tokens
from ..patterns import regex


def needed(model: nn.Module, name: str) -> bool:
    """Whether an adapter's file must hold the base's embedding and output weights too."""
    config = _switch(model).configs[name]
    before = _size_before(model, config.base_model_name_or_path)
    if rows_of(config):
        return before is not None and not _holds_rows(model, name, before)
    return before is not None or _targeted(model, name)


def grown(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names of the base's tables that have other rows than the base model of these adapters."""
    configs = [_switch(model).configs[name] for name in names]
    if all(_size_before(model, c.base_model_name_or_path) is None for c in configs):
        return []
    tables = {id(inside(layer)) for layer in codec.embedding_layers(model)}
    return [f"{path}.weight" for path, module in walk(model) if id(inside(module)) in tables]


def tensors_of(
    model: nn.Module, name: str, tensors: Collection[str], values: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The base's embedding and output weights, but for those that ``tensors`` has.

    Args:
        model: the user's model.
        name: the adapter's.
        tensors: names that are there already.
        values: the model's state dict, where its tensors had to be gathered from elsewhere.

    Raises:
        StateError: a weight is held in parts, and ``values`` lacks it.
    """

    def taken(key: str, weight: Tensor) -> Tensor:
        given = (values or {}).get(key, weight)
        if values is not None and (how := shards.split(given)):
            raise StateError(f"{key} is {how}, and the state_dict that was given lacks it")
        return shards.gather(key, given)

    wanted = {id(inside(layer)) for layer in codec.embedding_layers(model)}
    found, targeted, out = hosts(model), _targeted(model, name), {}
    for path, module in walk(model):
        if id(inside(module)) not in wanted or f"{path}.weight" in tensors:
            continue
        if path in found:
            key = f"{path}.base_layer.weight"
            out[key] = taken(key, found[path].pristine("weight")).detach()
        elif not targeted:
            key = f"{path}.weight"
            out[key] = taken(key, inside(module).get_parameter("weight")).detach()
    return out


def rows_of(config: PeftConfig) -> list[list[int]]:
    """The tokens whose rows an adapter holds by itself, for each table that its config names."""
    own = getattr(config, "token_indices", None)
    beside = getattr(config, "trainable_token_indices", None)
    named = list(beside.values()) if isinstance(beside, dict) else [beside]
    return [list(rows) for rows in (own, *named) if rows]


def grow(base: Any, config: PeftConfig, tensors: Mapping[str, Tensor], front: str) -> None:
    """Give a base model the vocabulary that an adapter was saved with.

    Args:
        base: a model of transformers.
        config: the adapter's.
        tensors: those of its file.
        front: what is in front of a module's path in their names.
    """
    getter = getattr(base, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    if table is None or not hasattr(base, "resize_token_embeddings"):
        return
    path = next((n for n, m in base.named_modules() if m is table), None)
    old = len(table.weight)
    for key in (f"{front}{path}.weight", f"{front}{path}.base_layer.weight"):
        if key in tensors and len(tensors[key]) != old:
            base.resize_token_embeddings(len(tensors[key]))
            return
    rows = rows_of(config)
    new = max([*map(max, rows), -1]) + 1
    tables = {mark(layer.get_parameter("weight")) for layer in codec.embedding_layers(base)}
    if new > old and len(rows) >= len(tables) and all({*range(old, new)} <= set(r) for r in rows):
        base.resize_token_embeddings(new, mean_resizing=False)  # the file has all new rows


def _switch(model: nn.Module) -> Switch:
    switch = switch_of(model)
    assert switch is not None
    return switch


def _targeted(model: nn.Module, name: str) -> bool:
    """Whether the adapter sits at an embedding or output layer of the names that PEFT knows."""
    targets = _switch(model).configs[name].to_dict().get("target_modules") or ()  # as in the file
    if not isinstance(targets, str):
        return bool({"embed_tokens", "lm_head"} & set(targets))
    known = [p for p, _ in walk(model) if p.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    return any(regex(targets).fullmatch(p) for p in known)


def _holds_rows(model: nn.Module, name: str, before: int) -> bool:
    """Whether the adapter has a row for each token beyond ``before``, in each table."""
    held: dict[Any, set[int]] = {}
    found = {id(inside(host)): host for host in hosts(model).values()}
    for layer in codec.embedding_layers(model):
        host, raw = found.get(id(inside(layer))), inside(layer).get_parameter("weight")
        own = held.setdefault(mark(raw), set(range(before, len(raw))))
        own -= _rows_at(host, name) if host else set()
    return not any(held.values())


def _rows_at(host: Host, name: str) -> set[int]:
    parts = [p.source[0] if isinstance(p, Tied) else p for _, p in host.parts_of(name)]
    return {int(i) for p in parts if isinstance(p, Tokens) for i in p.indices}


def _size_before(model: nn.Module, base: str | None) -> int | None:
    """The vocabulary's size by the base model's config on this machine; None where it is known to
    be the model's, or not known.
    """
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None or not base:
        return None
    path: Any = os.path.join(base, "config.json")
    if not os.path.isfile(path):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(base, "config.json")
        except HFValidationError:  # a path of another machine
            return None
    if not isinstance(path, str) or not os.path.isfile(path):
        return None
    before = read_json(Path(path)).get("vocab_size")
    return None if before == size or not isinstance(before, int) else before
