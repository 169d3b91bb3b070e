"""Which layers a config means. Every entry of every pattern must match something, or the error says
which one did not, what is near, and what the model offers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn

from ..config import TargetConfig
from ..engine.site import Conv1D, Site, kind_of
from ..engine.tree import inside
from ..errors import POLICY, TargetError, did_you_mean, nearest, warn
from ..patterns import patterns, regex
from ..regex import compiled
from .defaults import TARGETS
from .offer import Offer, Target, leaf

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier", "qa_outputs")  # classification heads that the task classes train


class Match:
    """What one config means in one model."""

    def __init__(self, offer: Offer, config: TargetConfig) -> None:
        self.offer, self.config = offer, config
        self.places: dict[str, list[Target]] = {}  # what a path stands for, once it is known

    def targets(self) -> list[Target]:
        """The places that the config means, in the model's order.

        Raises:
            TargetError: an entry of a pattern matches nothing, or a layer that cannot be adapted.
        """
        config = self.config
        wanted, bare = config.target_modules, self._parameters()
        paths = self.named("target_modules", wanted)
        found = [t for path in paths for t in self._at(path)] + bare
        found = self._in_blocks(list(dict.fromkeys(found)))
        out = set(self.named("exclude_modules", config.exclude_modules))
        saved = self.saved()
        kept = [t for t in found if not out & {t.path, t.name} and not within(t.path, saved)]
        if not kept:
            why = "is excluded or saved as a whole" if found else "is not in the model"
            raise TargetError(
                f"{type(config).__name__} finds no layer to adapt: what target_modules={wanted!r} "
                f"names {why}. {self.offer.table()}"
            )
        config.settle(self.offer.model_type, [t.path for t in kept])
        for field in [*config.PATTERNS, "overrides"]:
            known = patterns(*(getattr(config, field) or ()))
            those = kept if known.keys else []
            found_at = (known.meaning(t.path, t.parameter or "weight") for t in those)
            self._need(field, kept, set(chain.from_iterable(found_at)))
        for field in config.SUBSETS:
            wanted = getattr(config, field) or ()
            every = [wanted] if isinstance(wanted, str) else wanted
            meant = {e for e in every if any(config.means(e, t.path) for t in kept)}
            self._need(field, kept, meant)
        order = {path: i for i, path in enumerate(self.offer.modules)}
        return sorted(kept, key=lambda t: order.get(t.path, -1))

    def resolved(self) -> Any:
        """``target_modules`` as names or a regex, as a file says it: no shorthand, no default."""
        wanted = self.config.target_modules
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            task = getattr(self.config.task_type, "value", "")
            return self.offer.short(linear_layers(self.offer, task))
        if wanted is None and not getattr(self.config, "target_parameters", None):
            return self.config.usual(self.offer)
        return wanted

    def saved(self) -> list[str]:
        """The modules that are trained as a whole.

        PEFT's task classes write down heads under all names that they may have: where one of them
        is there, the others may be absent.
        """
        entries = list(self.config.modules_to_save or ())
        here = [e for e in entries if self.offer.ending_with(e)]
        if {"classifier", "score"} <= set(entries) or set(HEADS).intersection(here):
            entries = [e for e in entries if e in here or e not in HEADS]
        return self.named("modules_to_save", entries)

    def named(self, field: str, wanted: Any) -> list[str]:
        """The modules that a field names, by what paths end with or a regex for whole paths."""
        if wanted is None:
            return []
        adapted = field == "target_modules"
        known = [p for p in self.offer.modules if not adapted or self._places(p)]
        if isinstance(wanted, str):
            try:
                pattern = compiled(wanted)
            except re.error as error:
                raise TargetError(
                    f"{field}={wanted!r:.200} is no regular expression: {error}. For names, "
                    "give a list"
                ) from None
            hits = [p for p in known if pattern.fullmatch(p)]
            if not hits:
                word = re.split(r"[.()|]", wanted.strip("()$^.*"))[-1]
                problem = f"{field}={wanted!r} matches the whole path of no module"
                self._complain(problem, word, known)
            return hits
        hits = []
        for entry in sorted(wanted):
            now = self.offer.ending_with(entry)
            if not now:
                self._complain(f"{field} entry {entry!r} matches no module", entry, known)
            hits += now
        return hits

    def _at(self, path: str) -> list[Target]:
        """The places that a path in ``target_modules`` stands for."""
        found, module = self._places(path), self.offer.modules[path]
        if found:
            return found
        kind = type(module).__name__
        if not any(True for _ in module.children()):
            problem = (
                f", a {kind}, which is no known weighted layer: make it one with "
                f"graftwork.register_site({kind}, ...), or train it whole with modules_to_save"
            )
        elif not any(p.startswith(f"{path}.") for p in self.offer.modules if self._places(p)):
            problem = ", in which there is no layer to adapt"
        elif isinstance(self.config.target_modules, str):  # a regex meets them one by one
            return []
        else:
            problem = ", which is no layer but holds some; name them, or use a regex"
        self._complain(f"target_modules names {path}{problem}")
        return []

    def _places(self, path: str) -> list[Target]:
        if path not in self.places:
            self.places[path] = self.config.places(self.offer, path)
        return self.places[path]

    def _parameters(self) -> list[Target]:
        found, offered = [], self.offer.parameters()
        for entry in sorted(getattr(self.config, "target_parameters", None) or ()):
            hits = [t for full, t in offered.items() if f".{full}".endswith(f".{entry}")]
            if not hits:
                problem = f"target_parameters entry {entry!r} matches no parameter"
                self._complain(problem, entry, offered)
            found += hits
        return found

    def _in_blocks(self, targets: list[Target]) -> list[Target]:
        wanted = self.config.layers_to_transform
        if wanted is None or wanted == []:
            return targets
        indices = {wanted} if isinstance(wanted, int) else set(wanted)
        names = self.config.layers_pattern or ()
        names = (names,) if isinstance(names, str) else tuple(names)
        stems = {m[1] for t in targets for m in re.finditer(r"([^.]+)\.\d+\.", t.name)}
        for name in names:
            if all(_block(t, (name,)) is None for t in targets):
                problem = f"layers_pattern entry {name!r} stands in front of no block index"
                self._complain(problem, name, stems)
                names = tuple(n for n in names if n != name)
        number = {t: _block(t, names) for t in targets}
        offered = sorted({n for n in number.values() if n is not None})
        for index in sorted(indices - set(offered)):
            problem = f"layers_to_transform entry {index} is no block of the layers that are chosen"
            self._complain(f"{problem}; those are in {_ranges(offered) or 'none'}")
        return [t for t in targets if number[t] in indices]

    def _need(self, field: str, targets: list[Target], meant: set[str]) -> None:
        """Each entry of a field must mean one of the chosen layers."""
        wanted = getattr(self.config, field) or ()
        for entry in [wanted] if isinstance(wanted, str) else wanted:
            if entry not in meant:
                problem = f"{field} entry {entry!r} matches none of the {len(targets)}"
                self._complain(f"{problem} adapted layers", entry, [t.name for t in targets])

    def _complain(self, problem: str, word: str = "", names: Iterable[str] = ()) -> None:
        names = list(names)
        leaves = [leaf(n) for n in names]
        problem += did_you_mean(word, leaves if nearest(word, leaves) else names)
        if self.config.allow_unmatched or POLICY.lenient:
            warn(f"{problem}. It has no effect")
            return
        raise TargetError(
            f"{problem}. {self.offer.table()}\n"
            "Pass allow_unmatched=True in the config to go on without it."
        )


def usual(offer: Offer, config: TargetConfig) -> Any:
    """PEFT's choice for an architecture that it knows, the repeated blocks for others."""
    if config.EMBEDDINGS:
        return {offer.input_embedding()}
    known = TARGETS.get(config.method, {}).get(offer.model_type)
    if isinstance(known, str):
        return known
    if known and (present := {entry for entry in known if offer.ending_with(entry)}):
        return present  # the lists cover the variants of an architecture
    paths = repeated_blocks(offer)
    if not paths:
        raise TargetError(
            f"{type(offer.model).__name__} has no repeated blocks, so it is not known which "
            "layers to adapt. Give target_modules, for example 'all-linear' or a list of "
            f"names. {offer.table()}"
        )
    return offer.short(paths)


def linear_layers(offer: Offer, task: str = "") -> list[str]:
    """All linear layers but the output layer, or a classifier's head where the task has one."""
    getter = getattr(offer.model, "get_output_embeddings", None)
    heads = [getter() if callable(getter) else None]
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        heads += [getattr(offer.model, name, None) for name in HEADS]
    skip = {id(inside(head)) for head in heads if isinstance(head, nn.Module)}
    layers = offer.modules.items()
    return [p for p, m in layers if kind_of(m) in (Site, Conv1D) and id(m) not in skip]


def repeated_blocks(offer: Offer) -> list[str]:
    """The linear layers, and attention with weights of its own, of the model's repeated blocks."""
    blocks = []
    for path, module in offer.modules.items():
        children = [inside(child) for child in module.children()]
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if alike and any(True for _ in children[0].children()):
            blocks.append(f"{path}.")
    attention = [p for p, m in offer.modules.items() if isinstance(m, nn.MultiheadAttention)]
    within_attention = tuple(f"{p}." for p in attention)
    linear = [p for p in linear_layers(offer) if not p.startswith(within_attention)]
    return [p for p in attention + linear if p.startswith(tuple(blocks))]


def within(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of the roots, or in one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _block(target: Target, names: tuple[str, ...]) -> int | None:
    whole = target.parameter is None and kind_of(target.module) is None  # it may be a block itself
    path = f"{target.name}." if whole else target.name
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    if names:  # the last number behind one of them
        front = regex(rf"(?:.*\.)?(?:{'|'.join(names)})", str(names))
        numbers = [i for i in numbers[::-1] if front.fullmatch(".".join(parts[:i]))]
    return int(parts[numbers[0]]) if numbers else None


def _ranges(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
