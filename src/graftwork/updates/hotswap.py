"""Hot-swapping: another adapter's values in the place of one that is there, without recompilation.

What differs between two adapters of one method must be tensor data: values, and after ``prepare``
also ranks (padded with zero directions) and scales (as tensors).
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine.adapter import Adapter, Part
from ..engine.host import Host
from ..engine.inject import build, switch_of
from ..engine.switch import Switch
from ..engine.ties import Tied
from ..engine.tree import hosts
from ..errors import FileError, StateError, warn
from ..files import codec
from ..files.intact import intact
from ..methods.lora import LoRA
from ..targets.offer import Offer
from ..targets.plan import Key, Slot, plan

# what may differ: it is in tensors, says where the adapter sits, or matters in training alone
FREE = set(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "target_modules exclude_modules layers_to_transform layers_pattern allow_unmatched "
    "runtime_config fan_in_fan_out init_lora_weights init_weights r lora_alpha alpha use_rslora "
    "rank_pattern alpha_pattern overrides lora_dropout random_loc_seed random_seed scaling "
    "projection_prng_key projection_seed proj_seed token_indices trainable_token_indices "
    "adapters".split()
)


def prepare(model: nn.Module, target_rank: int | None, check_compiled: str = "error") -> None:
    """Make room: every LoRA gets ``target_rank`` directions, every scale becomes a tensor.

    Args:
        model: the user's model, before it is compiled.
        target_rank: the largest rank that will be swapped in; None: the ranks stay.
        check_compiled: "error", "warn" or "ignore": what to do where it is compiled already.

    Raises:
        StateError: the model is compiled already, or has no adapter.
    """
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    if compiled or hasattr(model, "_orig_mod"):
        text = "the model is compiled already; prepare it for hot-swapping before torch.compile"
        if check_compiled == "error":
            raise StateError(text)
        if check_compiled == "warn":
            warn(f"{text}. It will be compiled once more")
    every = [p for h in hosts(model).values() for n in h.adapters for _, p in h.parts_of(n)]
    if not every:
        raise StateError("there is no adapter yet; add one before preparing for hot-swapping")
    for part in every:
        if isinstance(part, LoRA) and target_rank is not None:
            part.pad(target_rank)
        if isinstance(part.scale, float):
            first = next(itertools.chain(part.parameters(), part.buffers()), None)
            scale = torch.tensor(part.scale, device=None if first is None else first.device)
            del part.scale
            part.held_scale = None
            part.register_buffer("scale", scale, persistent=False)


@torch.no_grad()
def swap(
    model: nn.Module,
    switch: Switch,
    name: str,
    config: TargetConfig,
    tensors: dict[str, Tensor],
    where: str,
) -> codec.LoadReport:
    """Give an adapter the values of another one.

    Args:
        model: the user's model.
        switch: its switch.
        name: the adapter that is there.
        config: that of the new values.
        tensors: the new values under PEFT's names.
        where: their source, for messages.

    Raises:
        StateError: the adapter is merged, or what differs is no tensor data.
        FileError: the values do not fit their config.
    """
    switch.check((name,))
    own = switch.configs[name]
    check(own, config, where)
    if any(name in host.merged_adapters for host in hosts(model).values()):
        raise StateError(f"{name!r} is merged: unmerge_adapter() before it is hot-swapped")
    config = copy.deepcopy(config)
    slots = plan(Offer(model), config)
    slots += _loose_ends(model, name, {(slot.path, slot.key) for slot in slots})
    built = build(model, slots, config, switch, start=False, autocast=True)
    owned = _owned(built, config)
    report, found = codec.compare(model, owned, tensors)
    codec.judge(report, where, strict=True)
    codec.fill(model, owned, tensors, found)
    pairs: list[tuple[Part, Part]] = [*_pairs(model, name, built.parts, where)]
    shared = next(filter(None, (h.shared_of(name) for h in hosts(model).values())), None)
    if shared is not None and built.shared is not None:
        pairs.append((shared, built.shared))
    for old, new in pairs:
        _fits(old, new, where)
    with intact(model, name):
        for old, new in pairs:
            _copy(old, new)
        vars(own).update(vars(config))  # in place: compiled code may refer to the object
        refresh(model, name)
    return report


@torch.no_grad()
def refresh(model: nn.Module, name: str) -> None:
    """Let what others derive from an adapter follow its new values."""
    switch = switch_of(model)
    names = () if switch is None else tuple(switch.flags.reading)
    for host in hosts(model).values() if names else ():
        for key, part in [p for other in names for p in host.parts_of(other)]:
            if part.reads and name in host.adapters:
                part.derive(host.need_site(key))


def _loose_ends(model: nn.Module, name: str, planned: set[Key]) -> list[Slot]:
    """The tied ends at which the adapter acts although the weights are two now: another adapter has
    been merged into one of them.
    """
    here = {(p, k): part for p, h in hosts(model).items() for k, part in h.parts_of(name)}
    places = {id(part): place for place, part in here.items()}
    return [
        Slot(path, key, None, source=places[id(part.source[0])],
             transposed=part.transposed, saved=part.saved)
        for (path, key), part in here.items()
        if isinstance(part, Tied) and (path, key) not in planned
    ]  # fmt: skip


def _owned(built: Any, config: TargetConfig) -> list[codec.Owned]:
    owned = [
        codec.Owned(part, f"{path}.{part.prefix}", config.at(path, _parameter(host, key)))
        for (path, key), (host, part) in built.parts.items()
    ]
    if built.shared is not None:
        owned.append(codec.Owned(built.shared, codec.MARK, config))
    return owned


def _parameter(host: Host, key: str) -> str:
    site = host.site_of(key)
    return site.parameter if site is not None else "weight"


def check(own: Any, new: Any, where: str) -> None:
    """Refuse what would compute otherwise than the adapter that is there."""
    if own.method != new.method:
        raise StateError(f"{where} is of the method {new.method}, the adapter there {own.method}")
    mine, theirs = own.to_dict(), new.to_dict()
    other = {k for k in mine.keys() | theirs.keys() if k not in FREE}
    differ = sorted(k for k in other if (mine.get(k) or None) != (theirs.get(k) or None))
    if differ:
        text = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in differ)
        raise StateError(
            f"{where} cannot be hot-swapped in, since it computes otherwise ({text}); load it "
            "under a name of its own"
        )


def _pairs(model: nn.Module, name: str, parts: Any, where: str) -> list[tuple[Adapter, Adapter]]:
    """The adapter's parts beside the new ones; a LoRA may leave layers out."""
    here = {(p, k): part for p, h in hosts(model).items() for k, part in h.parts_of(name)}
    if more := [path for path, key in parts if (path, key) not in here]:
        raise FileError(
            f"{where} also sits at {more[0]}, where the adapter to be swapped does not; load it "
            "under a name of its own"
        )
    pairs = []
    for place, old in here.items():
        if place in parts:
            pairs.append((old, parts[place][1]))
        elif isinstance(old, LoRA):
            silent = copy.deepcopy(old)
            silent.B.zero_()
            pairs.append((old, silent))
        else:
            raise FileError(
                f"{where} lacks {place[0]}, at which the adapter sits; load it with load_adapter "
                "under a name of its own"
            )
    return pairs


def _tensors(part: Part) -> dict[str, Tensor]:
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


def _fits(old: Part, new: Part, where: str) -> None:
    mine, theirs = _tensors(old), _tensors(new)
    if odd := sorted((mine.keys() ^ theirs.keys()) - {"scale"}):
        raise FileError(
            f"{where} and the adapter there do not both have {odd[0]}; load it under a name of its "
            "own"
        )
    for key, tensor in theirs.items():
        room = mine[key].shape
        larger = any(a < b for a, b in zip(room, tensor.shape, strict=True))
        if room != tensor.shape and (larger or not isinstance(old, LoRA)):
            raise FileError(
                f"{where} needs {tuple(tensor.shape)} for {key} and there is room for "
                f"{tuple(room)}; call prepare_model_for_compiled_hotswap(model, target_rank=...) "
                "first, with the largest rank"
            )


def _copy(old: Part, new: Part) -> None:
    """The values of ``new`` in the tensors of ``old``; room that is left over becomes zero."""
    mine = _tensors(old)
    for key, tensor in _tensors(new).items():
        if key == "scale":
            continue
        mine[key].zero_()
        mine[key][tuple(slice(n) for n in tensor.shape)].copy_(tensor)
    if isinstance(old, Adapter) and isinstance(new, Adapter):
        if isinstance(old.scale, Tensor):
            old.scale.copy_(torch.as_tensor(new.scale))
        else:
            old.scale = new.scale
        if isinstance(old, LoRA) and isinstance(new, LoRA):
            old.r = new.r
