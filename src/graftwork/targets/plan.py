"""The plan of an adapter: which part goes where, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ..config import TargetConfig
from ..engine.adapter import Adapter, Shared
from ..engine.host import Host
from ..engine.module import part_key
from ..engine.site import Conv1D, Embedding, Site, kind_of
from ..errors import warn
from .match import Match
from .offer import Offer, Target

Key = tuple[str, str]  # path, key of the part there
BENEATH, MAIN, ABOVE = range(3)  # the levels of parts at one layer


@dataclass
class Slot:
    """One part to build: where, under which key, how, and the front of its names in a file."""

    path: str
    key: str
    build: Callable[[Host, Shared | None], Adapter] | None
    prefix: str = ""
    level: int = MAIN
    source: Key | None = None  # the part at the other end of a tied weight, instead of ``build``
    transposed: bool = False  # whether the two ends see the weight transposed
    saved: bool = True  # whether PEFT's file repeats the tensors at that end
    times: float = 1.0  # how many times PEFT applies the update


def plan(offer: Offer, config: TargetConfig) -> list[Slot]:
    """All parts of an adapter; what the config leaves open is filled in."""
    config.prepare(offer)
    match = Match(offer, config)
    config.target_modules = match.resolved()
    _share(offer, config)
    targets = match.targets()
    slots = [*_main(config, targets), *config.companions(match, targets)]
    slots.sort(key=lambda slot: slot.level)
    return slots + _ties(offer, config, slots)


def _share(offer: Offer, config: TargetConfig) -> None:
    """With ``ensure_weight_tying``, a name of an embedding's other end means the embedding."""
    shared = getattr(config, "ensure_weight_tying", False) is not False
    named = config.target_modules
    for first in [p for p, m in offer.modules.items() if isinstance(m, nn.Embedding)]:
        if shared and isinstance(named, set):
            ends = {path for path in offer.ends.get(first, ()) if kind_of(offer.modules[path])}
            if far := {e for e in named if ends.intersection(offer.ending_with(e))}:
                named = config.target_modules = (named - far) | {first}


def _main(config: TargetConfig, targets: list[Target]) -> Iterator[Slot]:
    for t in targets:
        key = part_key(t.parameter) if t.parameter else config.method.lower()
        slot = Slot(t.path, key, at(config, key), _prefix(t, targets) if t.parameter else "")
        # PEFT 0.21 merges the output projection of an adapted attention twice, before each call
        slot.times = 2.0 if slot.prefix == "base_layer.out_proj." else 1.0
        yield slot


def at(config: TargetConfig, key: str) -> Callable[[Host, Shared | None], Adapter]:
    """How a config's own part at a key is built."""
    return lambda host, shared: config.build(host, key, shared)


def _prefix(target: Target, targets: list[Target]) -> str:
    """PEFT nests a wrapper per parameter, the first innermost; attention's output is a child."""
    mine = [t.parameter for t in targets if t.path == target.path and t.parameter]
    if isinstance(target.module, nn.MultiheadAttention):
        if target.parameter == "out_proj.weight":
            return "base_layer.out_proj." if len(mine) > 1 else "out_proj."
        return "" if target.parameter == "in_proj_weight" else f"{target.parameter}."
    own = [n for n in target.module._parameters if n in mine]
    return "base_layer." * (len(own) - 1 - own.index(target.parameter or ""))


def _ties(offer: Offer, config: TargetConfig, slots: list[Slot]) -> list[Slot]:
    """Where an adapter acts at both ends of a tied weight, a part that refers to the first end.

    Trained tokens always do, beneath what the method does at that end, as in PEFT. What sits at the
    input embedding also acts at the embeddings that are tied to it, since models such as T5 call
    only those.
    """
    wished = getattr(config, "ensure_weight_tying", False)
    first = offer.first_embedding()
    methods = {slot.path for slot in slots if slot.level == MAIN}
    above = {slot.path for slot in slots if slot.level == ABOVE}
    taken: dict[str, str] = {}  # the path whose parts act at an end
    extra = []
    for slot in slots:
        here = offer.modules[slot.path]
        if slot.level == BENEATH or not kind_of(here):
            continue
        tokens = slot.key == "trainable_tokens"
        everywhere = wished is not False or tokens
        for path in offer.ends.get(slot.path, ()):
            end = offer.modules[path]
            called = slot.path == first and isinstance(end, nn.Embedding)
            free = path not in above | (set() if tokens else methods)
            if not (free and kind_of(end) and (everywhere or called)):
                continue
            if taken.setdefault(path, slot.path) == slot.path:
                source, turned = (slot.path, slot.key), _turned(here) != _turned(end)
                saved = everywhere and not slot.prefix  # rows beside a LoRA are saved once
                key = "tied_tokens" if tokens else "tied"
                level = BENEATH if path in methods else ABOVE
                extra.append(Slot(path, key, None, "", level, source, turned, saved))
    if wished and not extra:
        warn("ensure_weight_tying has no effect: no adapter sits at a tied weight")
    return extra


def _turned(layer: nn.Module) -> bool:
    return issubclass(kind_of(layer) or Site, (Embedding, Conv1D))
