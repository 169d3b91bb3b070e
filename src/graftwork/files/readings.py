"""Other readings of a file that does not fit a model as it is: its layers under other names, and
layers that are fused in one of the two. A file says itself at which layers it sits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import TargetConfig
from ..engine.adapter import Adapter
from ..engine.host import Host
from ..engine.inject import build
from ..engine.site import ParameterSite, Standing, kind_of
from ..engine.switch import Switch
from ..errors import FileError
from ..targets.offer import Offer
from ..targets.plan import plan
from . import align, codec, fuse
from .relocate import Relocation, means

UNFIT = "it does not fit"


@dataclass
class Reading:
    """One way to read a file.

    Args:
        config: the config, with the layers of this model.
        tensors: what the file holds, under the names of this model.
        renamed: name in the file -> name in this model, where it is another one.
        edits: how names were changed, a ``key_mapping``.
        fused: layers of this model whose update was made of the file's.
        paths: layer in the file -> layer in this model.
    """

    config: Any
    tensors: dict[str, Tensor]
    renamed: dict[str, str]
    edits: dict[str, str]
    fused: list[str]
    paths: dict[str, str]

    def beside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are kept beside the file, under the names of this model."""
        found = {}
        for name, tensor in tensors.items():
            plain = name.removeprefix(codec.PREFIX)
            path = align.owner(plain, set(self.paths))
            new = plain if path is None else self.paths[path] + plain.removeprefix(path)
            found[codec.PREFIX + new if name != plain else new] = tensor
        return found

    def told(self, where: str) -> str:
        """What was done, in words."""
        text = [f"{where} was saved from a model whose layers have other names"]
        pairs = [(old, new) for old, new in self.renamed.items() if old != new]
        if self.edits and pairs:
            old, new = pairs[0]
            text.append(
                f"What is {old} there is {new} here; key_mapping={self.edits} says the same"
            )
        if self.fused:
            text.append(
                f"The updates of {len(self.fused)} layers were made of those in the file, exactly, "
                f"e.g. that of {self.fused[0]}, which are fused in one of the two models"
            )
        return ". ".join([*text, f"All {len(self.tensors)} tensors fit and are loaded"])


class Reader:
    """Finds the readings of one file in one model.

    Args:
        model: the user's model, without this adapter.
        switch: its switch.
        config: the config of the file.
        tensors: the tensors of the file, by the names there.
        mapping: how names are to be changed, where that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        switch: Switch,
        config: TargetConfig,
        tensors: dict[str, Tensor],
        mapping: dict[str, str] | None = None,
    ) -> None:
        self.mapping = mapping
        self.model, self.switch, self.config = model, switch, config
        self.tensors = {name.removeprefix(codec.PREFIX): t for name, t in tensors.items()}
        self.offer = Offer(model)
        self.paths = _places(self.offer)
        self.names = [n for n in self.tensors if not n.startswith(codec.ROOT)]
        self.reasons: list[str] = []

    def readings(self) -> list[Reading]:
        """Every reading with which all names and shapes fit."""
        found: dict[frozenset[tuple[str, str]], Reading] = {}
        leaves = {path.rpartition(".")[2] for path in self.paths}
        lora = self.config.method == "LORA"
        factors = fuse.sites(self.names) if lora else {}
        for pieces, taken in fuse.choices(factors, leaves, self.offer.model_type):
            gone = tuple(f"{path}." for path in taken)
            names = [n for n in self.names if not n.startswith(gone)] if gone else self.names
            given = [self.mapping] if self.mapping else None
            for edits in given or align.ways([*names, *pieces], self.paths):
                if not edits and not pieces:
                    continue  # as it is, it does not fit
                try:
                    one = _Try(self, pieces, names, edits).reading()
                except ValueError as error:  # among them the refusal of targets
                    self.reasons.append(str(error).partition("\n")[0])
                except FileError as error:
                    self.reasons.append(str(error).partition("\n")[0])
                else:
                    key = frozenset((name, str(t.shape)) for name, t in one.tensors.items())
                    found.setdefault(key, one)
        return list(found.values())

    @property
    def reason(self) -> str:
        """Why the reading that came nearest does not fit."""
        return max(self.reasons, key=lambda text: not text.startswith(UNFIT), default="")

    def why(self, where: object) -> str:
        """Why no reading fits: the layers of both sides, and the first reason that was found."""
        known = set(self.paths)
        lost = [n for n in self.names if align.owner(n, known) is None]
        sides = align.beside(lost, [p for p in self.paths if self.offer.adaptable(p)])
        text = f"What {where} names is not there under other names either"
        text += f": {self.reason}" if self.reason else ""
        return (
            f"{text}. Its names and the model's layers, numbers as *:\n{sides}" if sides else text
        )


class _Try:
    """One way to read it, before it is known whether it fits."""

    def __init__(
        self,
        reader: Reader,
        pieces: dict[str, fuse.Piece],
        names: list[str],
        edits: dict[str, str],
    ) -> None:
        self.reader, self.pieces, self.names, self.edits = reader, pieces, names, edits
        self.known = set(reader.paths)
        every = [*names, *pieces]
        if reader.mapping:
            self.new = {n: codec.renamed(n, edits) for n in every}
        else:
            self.new = {n: align.edited(n, edits, self.known) for n in every}
        self.at: dict[str, str] = {}  # layer here -> layer there, of the method's own
        self.saved: dict[str, str] = {}
        self.tokens: dict[str, str] = {}
        for name, new in self.new.items():
            path = align.owner(new, self.known)
            if path is None:
                raise FileError(f"no layer of the model has the name {new}")
            self._sort(name, new, path)

    def _sort(self, name: str, new: str, path: str) -> None:
        tail = new[len(path) :]
        old = name.removesuffix(tail)
        saved = [e for e in self.reader.config.modules_to_save or () if f".{e}." in f".{name}"]
        if saved:
            inner = f".{name}".rpartition(f".{saved[0]}.")[2]
            self.saved[new.removesuffix(f".{inner}")] = name.removesuffix(f".{inner}")
        elif tail.startswith(".token_adapter."):
            self.tokens[path] = old
        elif tail not in (".bias", ".base_layer.bias"):
            self.at[path] = old

    def reading(self) -> Reading:
        """This reading.

        Raises:
            FileError: it does not fit.
            TargetError: its layers cannot be adapted.
        """
        reader = self.reader
        place = Relocation(
            reader.config, reader.offer, reader.paths, self.at, self.saved, self.tokens
        )
        place.need_all()
        factors = self._factors() if self.pieces else {}
        config = place.moved(factors)
        planned = copy.deepcopy(config)
        built = build(
            reader.model, plan(reader.offer, planned), planned, reader.switch,
            start=False, autocast=True,
        )  # fmt: skip
        owned = [
            codec.Owned(part, f"{path}.{part.prefix}", planned.at(path, _parameter(host, key)))
            for (path, key), (host, part) in built.parts.items()
        ]
        if built.shared is not None:
            owned.append(codec.Owned(built.shared, codec.MARK, planned))
        shared = {n: t for n, t in reader.tensors.items() if n.startswith(codec.ROOT)}
        tensors = {codec.PREFIX + self.new[n]: reader.tensors[n] for n in self.names} | shared
        for (path, key), (host, part) in built.parts.items():
            if (one := factors.get((path, _parameter(host, key)))) is not None:
                tensors |= _written(f"{path}.{part.prefix}", part, one)
        report, _ = codec.compare(nn.Module(), owned, tensors)
        if not report.ok:
            raise FileError(f"{UNFIT}: {report}")
        renamed = {n: self.new[n] for n in self.names if n != self.new[n]}
        fused = [path for path, _ in factors]
        paths = {old: new for new, old in self.at.items()}
        return Reading(config, tensors, renamed, self.edits, fused, paths)

    def _factors(self) -> dict[tuple[str, str], fuse.Factors]:
        """What is made of the file's updates, by layer and parameter here.

        Raises:
            FileError: the method is another one, or it is not known which outputs are whose.
        """
        reader, config = self.reader, self.reader.config
        _need_plain(config)
        of = {}
        for path, tails in fuse.sites(reader.tensors).items():
            held = {tail: reader.tensors[f"{path}.{tail}"] for tail in tails}
            if lost := {fuse.A, fuse.B} - tails:
                raise FileError(f"it has no {lost.pop()} for {path}")
            a, b, here = held.pop(fuse.A), held.pop(fuse.B), config.at(path)
            if (a.ndim, len(a)) != (2, here.r):  # type: ignore[attr-defined]
                raise FileError(f"{path} has another rank in the config than in the file")
            of[path] = fuse.Factors(a, b, _scale(here, len(a)), held)
        found = {}
        for piece in self.pieces.values():
            if lost := {part for part in piece.parts if part not in of and means(config, part)}:
                raise FileError(f"it has nothing for {min(lost)}, which the config means")
            path = str(align.owner(self.new[piece.name], self.known))
            experts, outs = 0, [_out(reader.offer, path)]
            if piece.parameter:
                weight = reader.offer.modules[path]._parameters.get(piece.parameter)
                if weight is None or weight.ndim != 3:
                    raise FileError(f"{path} has no stack {piece.parameter}")
                experts = len(weight)
                stack = Standing(reader.offer.modules[path], path)
                outs = [ParameterSite(stack, piece.parameter).shape[0]]
            elif piece.index is not None:
                front = path.rpartition(".")[0]
                whole = piece.parts[0].rpartition(".")[2]
                outs = [_out(reader.offer, f"{front}.{leaf}") for leaf in fuse.FUSED[whole]]
            found[path, piece.parameter or "weight"] = fuse.made(piece, of, outs, experts)
        return found


def _places(offer: Offer) -> list[str]:
    """The paths of modules that have tensors of their own, but for those around others."""
    own = [
        p for p, m in offer.modules.items() if any(t is not None for t in m._parameters.values())
    ]
    around = {path[:at] for path in own for at in range(len(path)) if path[at] == "."}
    return [path for path in own if path not in around or offer.adaptable(path)]


def _out(offer: Offer, path: str) -> int:
    module = offer.modules.get(path)
    kind = kind_of(module) if module is not None else None
    if module is None or kind is None:
        return 0
    return int(kind(Standing(module)).shape[0])


def _parameter(host: Host, key: str) -> str:
    site = host.site_of(key)
    return site.parameter if site is not None else ""


def _scale(config: Any, rank: int) -> float:
    return float(config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _written(front: str, part: Adapter, one: fuse.Factors) -> dict[str, Tensor]:
    """An update as a file has it."""
    if not {"A", "B"} <= part.keys.keys():
        rows = {t.removeprefix(part.prefix): v for t, v in one.rows.items()}
        return {codec.PREFIX + front + "bias": rows["bias"]} if "bias" in rows else {}
    site: Any = part.site
    a, b = site.from_factors(one.a, one.b)
    found = {part.keys["A"]: a, part.keys["B"]: b}
    for tail, values in one.rows.items():
        if tail in part.keys.values():
            found[tail] = values.reshape(part.file_tensors()[tail].shape)
    return {codec.PREFIX + front + key: tensor for key, tensor in found.items()}


def _need_plain(config: Any) -> None:
    from ..inits import STARTS

    start = STARTS.get(str(config.init_lora_weights).lower().partition("_niter")[0])
    what = config.variant if config.variant not in (None, "use_dora") else ""
    if start is not None and start.subtract:
        what = f"init_lora_weights={config.init_lora_weights!r}"
    if what:
        raise FileError(
            f"with {what} an update follows from the whole weight of its layer, so it cannot be "
            "read where layers are fused otherwise; save it as a plain LoRA from a model of its own"
        )


def fitting(found: Iterable[Reading], where: str) -> Reading | None:
    """The one reading; None where there is none.

    Raises:
        FileError: there are several.
    """
    every = list(found)
    if len(every) > 1:
        ways = "\n".join(f"  {_example(one)}" for one in every[:4])
        raise FileError(
            f"{where} fits this model in {len(every)} ways, and it cannot be known which is meant:"
            f"\n{ways}\nNothing was loaded. Pass the key_mapping of the right one."
        )
    return every[0] if every else None


def _example(one: Reading) -> str:
    pairs = [f"{old} -> {new}" for old, new in one.renamed.items()]
    return f"key_mapping={one.edits}: {next(iter(pairs), 'fused layers')}"
