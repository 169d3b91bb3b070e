"""Which layers a config means. Every entry of every pattern must match something, or the error says
which one did not, what is near, and what the model offers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import TargetConfig, pattern_matches
from ..errors import POLICY, TargetError, did_you_mean, nearest, warn
from .offer import Offer, Target, leaf
from .site import Conv1D, Site, kind_of
from .tree import inside

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier", "qa_outputs")  # classification heads that the task classes train


def find(offer: Offer, config: TargetConfig) -> list[Target]:
    """The places that ``config`` means, in the model's order.

    Raises:
        TargetError: an entry of a pattern matches nothing, or a layer that cannot be adapted.
    """
    wanted, bare = config.target_modules, _parameters(offer, config)
    paths = named(offer, config, "target_modules", wanted)
    found = [t for path in paths for t in _targets(offer, config, path)] + bare
    found = _in_blocks(offer, config, list(dict.fromkeys(found)))
    out = set(named(offer, config, "exclude_modules", config.exclude_modules))
    saved = saved_modules(offer, config)
    kept = [
        t for t in found if t.path not in out and t.name not in out and not within(t.path, saved)
    ]
    if not kept:
        why = "is excluded or saved as a whole" if found else "is not in the model"
        raise TargetError(
            f"{type(config).__name__} finds no layer to adapt: what target_modules={wanted!r} "
            "names "
            f"{why}. {offer.table()}"
        )
    config.settle(_model_type(offer), [t.path for t in kept])
    for field in config.PATTERNS:
        _need(
            offer,
            config,
            field,
            kept,
            lambda k, t: pattern_matches(k, t.path, t.parameter or "weight"),
        )
    for field in config.SUBSETS:
        _need(offer, config, field, kept, lambda k, t: config.means(k, t.path))
    order = {path: i for i, path in enumerate(offer.modules)}
    return sorted(kept, key=lambda t: order.get(t.path, -1))


def named(offer: Offer, config: TargetConfig, field: str, wanted: Any) -> list[str]:
    """The modules that a field names, by names that paths end with or a regex for whole paths."""
    if wanted is None:
        return []
    adapted = field == "target_modules"
    known = [p for p in offer.modules if not adapted or offer.adaptable(p)]
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise TargetError(
                f"{field}={wanted!r} is no regular expression: {error}. For names, give a list"
            ) from None
        hits = [p for p in known if pattern.fullmatch(p)]
        if not hits:
            word = re.split(r"[.()|]", wanted.strip("()$^.*"))[-1]
            _complain(
                offer,
                config,
                f"{field}={wanted!r} matches the whole path of no module",
                word,
                known,
            )
        return hits
    hits = []
    for entry in sorted(wanted):
        now = offer.ending_with(entry)
        if not now:
            _complain(offer, config, f"{field} entry {entry!r} matches no module", entry, known)
        hits += now
    return hits


def _targets(offer: Offer, config: TargetConfig, path: str) -> list[Target]:
    found, module = offer.targets(path), offer.modules[path]
    if not found and not any(True for _ in module.children()):
        kind = type(module).__name__
        _complain(
            offer,
            config,
            f"target_modules names {path}, a {kind}, which is no known weighted layer: make it "
            "one with "
            f"graftwork.register_site({kind}, ...), or train it whole with modules_to_save",
        )
    elif not found and not any(
        p.startswith(f"{path}.") and offer.adaptable(p) for p in offer.modules
    ):
        _complain(
            offer, config, f"target_modules names {path}, in which there is no layer to adapt"
        )
    elif not found and not isinstance(config.target_modules, str):
        _complain(
            offer,
            config,
            f"target_modules names {path}, which is no layer but holds some; name them, or use a "
            "regex",
        )
    return found


def linear_layers(offer: Offer, task: str = "") -> list[str]:
    """All linear layers but the output layer, or a classifier's head where the task has one."""
    getter = getattr(offer.model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    heads = [output] if output is not None else []
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


def resolved(offer: Offer, config: TargetConfig) -> Any:
    """``target_modules`` as names or a regex, as a file says it: no shorthand, no default."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return _short(offer, linear_layers(offer, getattr(config.task_type, "value", "")))
    if wanted is None and not getattr(config, "target_parameters", None):
        return _default(offer, config)
    return wanted


def _short(offer: Offer, paths: list[str]) -> set[str]:
    """Names that choose these layers and no others: last names where those suffice."""
    adaptable = {n: [p for p in at if offer.adaptable(p)] for n, at in offer.by_leaf.items()}
    return {leaf(p) if set(adaptable[leaf(p)]) <= set(paths) else p for p in paths}


def saved_modules(offer: Offer, config: TargetConfig) -> list[str]:
    """The modules that are trained as a whole; heads that a task class added may be absent."""
    entries = [e for e in config.modules_to_save or () if e not in HEADS or offer.ending_with(e)]
    return named(offer, config, "modules_to_save", entries)


def within(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of the roots, or in one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _model_type(offer: Offer) -> str:
    return str(getattr(getattr(offer.model, "config", None), "model_type", ""))


def _default(offer: Offer, config: TargetConfig) -> Any:
    if config.EMBEDDINGS:
        return {offer.input_embedding()}
    known = config.TARGETS.get(_model_type(offer))
    if isinstance(known, str):
        return known
    if known and (present := {entry for entry in known if offer.ending_with(entry)}):
        return present  # the lists cover the variants of an architecture
    paths = repeated_blocks(offer)
    if not paths:
        raise TargetError(
            f"{type(offer.model).__name__} has no repeated blocks, so it is not known which "
            "layers to "
            "adapt. Give target_modules, for example 'all-linear' or a list of names. "
            + offer.table()
        )
    return _short(offer, paths)


def _parameters(offer: Offer, config: TargetConfig) -> list[Target]:
    found = []
    for entry in sorted(getattr(config, "target_parameters", None) or ()):
        hits, names = [], []
        for path, module in offer.modules.items():
            for name, p in module._parameters.items():
                full = f"{path}.{name}"
                names.append(full)
                if p is not None and (full == entry or full.endswith(f".{entry}")):
                    own = name == "weight" and kind_of(module) is not None
                    hits.append(Target(path, module, None if own else name))
        if not hits:
            problem = f"target_parameters entry {entry!r} matches no parameter"
            _complain(offer, config, problem, entry, names)
        found += hits
    return found


def _in_blocks(offer: Offer, config: TargetConfig, targets: list[Target]) -> list[Target]:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return targets
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    names = config.layers_pattern or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    stems = {m[1] for t in targets for m in re.finditer(r"([^.]+)\.\d+\.", t.name)}
    for name in names:
        if all(_block(t.name, (name,)) is None for t in targets):
            problem = f"layers_pattern entry {name!r} stands in front of no block index"
            _complain(offer, config, problem, name, stems)
            names = tuple(n for n in names if n != name)
    number = {t: _block(t.name, names) for t in targets}
    offered = sorted({n for n in number.values() if n is not None})
    for index in sorted(indices - set(offered)):
        problem = f"layers_to_transform entry {index} is no block of the layers that are chosen"
        _complain(offer, config, f"{problem}; those are in {_ranges(offered) or 'none'}")
    return [t for t in targets if number[t] in indices]


def _block(path: str, names: tuple[str, ...]) -> int | None:
    front = rf"(?:.*\.)?(?:{'|'.join(names)})\." if names else r"(?:.*?\.)??"
    found = re.match(rf"{front}(\d+)\.", path)
    return int(found[1]) if found else None


def _need(
    offer: Offer, config: TargetConfig, field: str, targets: list[Target], means: Any
) -> None:
    """Each entry of a field must mean one of the chosen layers."""
    wanted = getattr(config, field) or ()
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        if not any(means(entry, t) for t in targets):
            problem = f"{field} entry {entry!r} matches none of the {len(targets)} adapted layers"
            _complain(offer, config, problem, entry, [t.name for t in targets])


def _complain(
    offer: Offer, config: TargetConfig, problem: str, word: str = "", names: Iterable[str] = ()
) -> None:
    names = list(names)
    leaves = [leaf(n) for n in names]
    problem += did_you_mean(word, leaves if nearest(word, leaves) else names)
    if config.allow_unmatched or POLICY.lenient:
        warn(f"{problem}. It has no effect")
        return
    raise TargetError(
        f"{problem}. {offer.table()}\nPass allow_unmatched=True in the config to go on without it."
    )


def _ranges(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
