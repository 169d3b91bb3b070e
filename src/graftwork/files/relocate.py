"""The config of an adapter for a model whose layers have other names than those of its own."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TargetConfig
from ..errors import FileError
from ..targets.offer import Offer
from .fuse import FUSED, Factors


@dataclass
class Relocation:
    """Where the layers of a file are in a model.

    Args:
        config: the config of the file.
        offer: what the model has.
        paths: the layers of the model, and what else has tensors of its own.
        at: layer here -> layer there, of the method's own.
        saved: the same of modules that are trained as a whole.
        tokens: the same of embeddings whose rows are trained.
    """

    config: TargetConfig
    offer: Offer
    paths: list[str]
    at: dict[str, str]
    saved: dict[str, str]
    tokens: dict[str, str]

    def moved(self, factors: Mapping[tuple[str, str], Factors]) -> Any:
        """The file's config, with the layers of this model instead of patterns."""
        old, offer = self.config, self.offer
        new: Any = copy.deepcopy(old)
        layers = {path for path in self.at if offer.adaptable(path)}
        bare = self._bare(layers, factors)
        new.target_modules = _exactly(offer, layers) if layers else None if bare else set()
        if bare:
            new.target_parameters = bare
        if not layers and not bare:
            new.target_modules = old.target_modules
        new.modules_to_save = sorted(self.saved) or None
        new.exclude_modules = new.layers_to_transform = new.layers_pattern = None
        if isinstance(old.trainable_token_indices, dict):
            new.trainable_token_indices = {
                path: ids
                for path, was in self.tokens.items()
                for entry, ids in old.trainable_token_indices.items()
                if was == entry or was.endswith(f".{entry}")
            }
        for name in old.SUBSETS:
            if wanted := getattr(old, name):
                every = [wanted] if isinstance(wanted, str) else wanted
                meant = {p for p, was in self.at.items() if any(old.means(e, was) for e in every)}
                setattr(new, name, meant)
        self._patterns(new)
        for (path, parameter), one in factors.items():
            at = re.escape(path if parameter == "weight" else f"{path}.{parameter}")
            root = math.sqrt(one.rank) if new.use_rslora else one.rank
            new.rank_pattern[at], new.alpha_pattern[at] = one.rank, one.scale * root
        return new

    def _patterns(self, new: Any) -> None:
        """Values per layer, by the layers' names here."""
        old = self.config
        for name, field in old.PATTERNS.items():
            values = {}
            for path, was in self.at.items():
                if (value := old.changes(was, "weight").get(field)) is not None:
                    values[re.escape(path)] = value
            setattr(new, name, values)
        new.overrides = {
            re.escape(path): changed
            for path, was in self.at.items()
            if old.overrides and (changed := TargetConfig.changes(old, was, "weight"))
        }
        kept = getattr(old, "rank_pattern", None)
        if isinstance(kept, dict) and "rank_pattern" not in old.PATTERNS:
            fronts = {f"{was}.": f"{path}." for path, was in self.at.items()}
            new.rank_pattern = {
                next((p + k.removeprefix(w) for w, p in fronts.items() if k.startswith(w)), k): v
                for k, v in kept.items()
            }

    def _bare(self, layers: set[str], factors: Mapping[tuple[str, str], Factors]) -> list[str]:
        """Single parameters that are meant by what used to be layers."""
        old = self.config
        made = [f"{path}.{own}" for path, own in factors if own != "weight" or path not in layers]
        stacks = {path for path, own in factors if own != "weight"}
        if old.target_parameters:
            return sorted({*old.target_parameters, *made})
        for path in self.at.keys() - layers - stacks:
            own = [
                n
                for n, p in self.offer.modules[path]._parameters.items()
                if p is not None and p.ndim == 2
            ]
            made += [f"{path}.{n}" for n in own]
        return sorted(made)

    def need_all(self) -> None:
        """Stop where the config means layers beside those in the file: then some are missing.

        Raises:
            FileError: it does.
        """
        fronts = {_body(path): _body(old) for path, old in self.at.items() if _body(path) != path}
        old = self.config
        for path in self.paths:
            front = fronts.get(_body(path))
            if front is None or path in self.at or not self.offer.adaptable(path):
                continue
            was = front + path.removeprefix(_body(path))
            for one in _before(was):
                if means(old, one) and not any(f"{path}.".startswith(f"{s}.") for s in self.saved):
                    raise FileError(f"it has nothing for {path}, which the config means")


def _before(path: str) -> Iterator[str]:
    """The names that a layer may have had."""
    yield path
    front, _, leaf = path.rpartition(".")
    for whole, parts in FUSED.items():
        yield from (f"{front}.{part}" for part in parts if leaf == whole)
        yield from (f"{front}.{whole}" for _ in range(leaf in parts))


def means(config: Any, path: str) -> bool:
    """Whether a config names a layer, by its path in the config's own model."""
    wanted, out = config.target_modules, config.exclude_modules
    blocks = config.layers_to_transform
    if blocks not in (None, []):
        index = next((int(word) for word in path.split(".") if word.isdigit()), None)
        if index not in ([blocks] if isinstance(blocks, int) else blocks):
            return False
    return _names(wanted, path) and not _names(out, path)


def _names(wanted: Any, path: str) -> bool:
    if not wanted or wanted == "all-linear":
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == entry or path.endswith(f".{entry}") for entry in wanted)


def _body(path: str) -> str:
    """The path of the list in whose blocks a layer is; the layer's own where it is in none."""
    words = path.split(".")
    at = next((i for i, word in enumerate(words) if word.isdigit()), len(words))
    return ".".join(words[:at])


def _exactly(offer: Offer, paths: set[str]) -> set[str] | str:
    """Targets that mean these layers and no others."""
    short = offer.short(sorted(paths))
    hits = {path for entry in short for path in offer.ending_with(entry)}
    return short if hits == paths else "|".join(re.escape(path) for path in sorted(paths))
