"""LoRAs of layers that are one layer in the model, or the other way round: as transformers 5 has
``gate_proj`` and ``up_proj`` in ``gate_up_proj``, Phi-3 the three of attention in ``qkv_proj``, and
many models their experts in two stacked parameters.

Both ways are exact. One update of several layers has the rows A of all, one upon the other, and the
columns B in blocks: the rank is the sum of theirs. The update of a part has the whole A, and the
part's rows of B. What belongs to single outputs (DoRA's norms, biases) is joined or cut by rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FileError
from ..targets.experts import stacked_names

# the layer -> what it is made of, in the order of its outputs
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ALIKE = {"k_proj": "v_proj", "v_proj": "k_proj"}  # these have the same number of outputs
INTERLEAVED = {"codegen", "minimax", "zaya"}  # model types whose qkv_proj has another order
A, B = "lora_A.weight", "lora_B.weight"
ROWS = ("lora_B.bias", "lora_magnitude_vector", "base_layer.bias")  # a number for each output


@dataclass
class Factors:
    """The update s B A of one layer: A (..., r, in), B (..., out, r), and what it has by rows."""

    a: Tensor
    b: Tensor
    scale: float
    rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def out(self) -> int:
        return int(self.b.shape[-2])

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])


@dataclass(frozen=True)
class Piece:
    """What a file has to give for one layer of the model.

    Args:
        path: the layer, by the names in the file.
        parts: the file's layers that it is made of, in order; or the one that it is a part of.
        index: which part of that one it is; None: it is made of ``parts``.
        parameter: the parameter of a stack of experts, whose parts come one expert after another.
    """

    path: str
    parts: tuple[str, ...]
    index: int | None = None
    parameter: str = ""

    @property
    def name(self) -> str:
        """The name of its A, as if it were in the file."""
        return ".".join(filter(None, (self.path, self.parameter, A)))


def sites(names: Iterable[str]) -> dict[str, set[str]]:
    """The layers of a LoRA's file, and what it has of each."""
    found: dict[str, set[str]] = {}
    for name in names:
        if tail := next((t for t in (A, B, *ROWS) if name.endswith(f".{t}")), None):
            found.setdefault(name.removesuffix(f".{tail}"), set()).add(tail)
    return found


def choices(
    file: Iterable[str], leaves: set[str], model_type: str
) -> Iterator[tuple[dict[str, Piece], set[str]]]:
    """What of a file can be read as other layers, in every combination.

    Args:
        file: the layers in the file.
        leaves: the last names of the model's layers.
        model_type: the model's type, as transformers calls it.

    Yields:
        The pieces by path, and the layers of the file that they take.
    """
    paths = sorted(file)
    kinds = [_experts(paths, stacked_names(model_type))]
    for whole, parts in FUSED.items():
        if whole != "qkv_proj" or model_type not in INTERLEAVED:
            kinds += [_joined(paths, whole, parts)] if whole in leaves else []
            kinds += [_cut(paths, whole, parts)] if leaves.issuperset(parts) else []
    kinds = [kind for kind in kinds if kind]
    for chosen in product((False, True), repeat=len(kinds)):
        pieces = [p for kind, on in zip(kinds, chosen, strict=True) if on for p in kind]
        taken = [set(p.parts) for p in pieces]
        yield {p.name: p for p in pieces}, set().union(*taken)


def _joined(paths: Sequence[str], whole: str, parts: tuple[str, ...]) -> list[Piece]:
    parents = dict.fromkeys(p.rpartition(".")[0] for p in paths if _leaf(p) in parts)
    return [Piece(_in(front, whole), tuple(_in(front, p) for p in parts)) for front in parents]


def _cut(paths: Sequence[str], whole: str, parts: tuple[str, ...]) -> list[Piece]:
    fronts = [(path, path.rpartition(".")[0]) for path in paths if _leaf(path) == whole]
    return [Piece(_in(f, p), (path,), i) for path, f in fronts for i, p in enumerate(parts)]


def _experts(paths: Sequence[str], stacked: Mapping[str, str]) -> list[Piece]:
    """The pieces for stacked experts, of which a file has each as a layer of its own."""
    found: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        at = re.fullmatch(r"(.*\bexperts)\.(\d+)\.([^.]+)", path)
        if at and at[3] in stacked:
            found.setdefault((at[1], stacked[at[3]]), set()).add(int(at[2]))
    pieces = []
    for (front, parameter), every in found.items():
        order = [old for old, new in stacked.items() if new == parameter]
        parts = tuple(f"{front}.{i}.{old}" for i in range(max(every) + 1) for old in order)
        pieces.append(Piece(front, parts, None, parameter))
    return pieces


def made(piece: Piece, of: Mapping[str, Factors], outs: Sequence[int], experts: int) -> Factors:
    """The update of one layer of the model.

    Args:
        piece: where it comes from.
        of: the updates in the file, by path.
        outs: the outputs of the layer; of a part, those of all parts.
        experts: how many matrices are stacked there; 0 where it is no stack.

    Raises:
        FileError: it is not known which outputs are whose.
    """
    if piece.index is not None:
        return _part(of[piece.parts[0]], outs, piece.index, piece.path)
    if not piece.parameter:
        return _whole(piece.parts, of, outs[0], piece.path)
    step = len(piece.parts) // experts if experts else 0
    if not step or step * experts != len(piece.parts):
        raise FileError(f"the model has {experts} experts at {piece.path}, and the file others")
    groups = [piece.parts[i : i + step] for i in range(0, len(piece.parts), step)]
    every = [_whole(group, of, outs[0], piece.path) for group in groups]
    if any(one.rows for one in every):
        raise FileError(f"DoRA's norms and biases of the experts at {piece.path} have no place")
    top, scale = max(one.rank for one in every), every[0].scale
    a = torch.stack([F.pad(one.a, (0, 0, 0, top - one.rank)) for one in every])
    b = torch.stack([F.pad(_scaled(one, scale), (0, top - one.rank)) for one in every])
    return Factors(a, b, scale)


def _whole(parts: Sequence[str], of: Mapping[str, Factors], out: int, path: str) -> Factors:
    here = {part: of[part] for part in parts if part in of}
    if not here:
        raise FileError(f"the file has nothing for {parts[0]}")
    outs = _outs(parts, {part: one.out for part, one in here.items()}, out, path)
    first = next(iter(here.values()))
    a = torch.cat([one.a for one in here.values()])
    b = first.b.new_zeros(out, len(a))
    row = column = 0
    for part, rows in zip(parts, outs, strict=True):
        if part in here:
            b[row : row + rows, column : column + here[part].rank] = _scaled(
                here[part], first.scale
            )
            column += here[part].rank
        row += rows
    tails = {tail for one in here.values() for tail in one.rows}
    if lost := [p for p in parts for t in tails if p not in here or t not in here[p].rows]:
        what = f"{sorted(tails)[0]} of {lost[0]}"
        raise FileError(f"{what} is not in the file, so that of {path} would not be whole")
    joined = {t: torch.cat([one.rows[t].flatten() for one in here.values()]) for t in tails}
    return Factors(a, b, first.scale, joined)


def _part(whole: Factors, outs: Sequence[int], index: int, path: str) -> Factors:
    if sum(outs) != whole.out:
        raise FileError(
            f"{path} is one of layers with {list(outs)} outputs, the file's has {whole.out}"
        )
    rows = {tail: torch.split(t.flatten(), list(outs))[index] for tail, t in whole.rows.items()}
    return Factors(whole.a, torch.split(whole.b, list(outs))[index], whole.scale, rows)


def _outs(parts: Sequence[str], known: Mapping[str, int], out: int, path: str) -> list[int]:
    """How many outputs each part has, also those that the file has no update of."""
    found = {_leaf(part): n for part, n in known.items()}
    for leaf, twin in ALIKE.items():
        if twin in found and any(_leaf(part) == leaf for part in parts):
            found.setdefault(leaf, found[twin])
    open_ = [_leaf(part) for part in parts if _leaf(part) not in found]
    left = out - sum(found.values())
    alike = len(open_) == 1 or set(open_) == set(ALIKE)
    if open_ and left > 0 and left % len(open_) == 0 and alike:
        found |= dict.fromkeys(open_, left // len(open_))
    if sum(found.values()) != out or len(found) != len(parts):
        raise FileError(f"{path} has {out} outputs, and the file's layers {dict(known)}")
    return [found[_leaf(part)] for part in parts]


def _scaled(one: Factors, scale: float) -> Tensor:
    return one.b if one.scale == scale else one.b * (one.scale / scale)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _in(front: str, leaf: str) -> str:
    return f"{front}.{leaf}" if front else leaf
