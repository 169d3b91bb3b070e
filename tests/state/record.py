"""One adapter as the reference knows it: its bits, and what they make of a weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from formulas import RULES
from torch import Tensor
from zoo import PATHS

COPIES = ("weight", "bias", "ln_tuning_layers.weight", "ln_tuning_layers.bias")
BIAS, ROWS = "base_layer.bias", "token_adapter.trainable_tokens_delta"
TIED = "tied rows"  # at the head: those of the embedding, beneath what else is there
FROZEN = ("vera_A", "vera_B", "delora_w_norm")  # in files, and never trained


@dataclass
class Record:
    """One adapter, in the model or in a file."""

    label: str
    config: Any
    trains: bool = False
    inference: bool = False  # what its config says
    base: int = 0  # of a file: the base that it was saved from
    tensors: dict[str, Tensor] = field(default_factory=dict)  # as a file names them
    room: dict[str, int] = field(default_factory=dict)  # of AdaLoRA: triplets at each path
    steps: int = 0  # of training, as far as it is known
    resumes: bool = False  # of a file: it holds the state of a schedule
    version: int = 0
    tied: bool = False  # whether the head has the weight of the embedding

    _versions = itertools.count(1)

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Have these values from now on."""
        self.tensors, self.version = tensors, next(self._versions)
        self.__dict__.pop("at", None)

    @cached_property
    def at(self) -> dict[str, dict[str, Tensor]]:
        """Path -> its tensors there, with those that all paths share."""
        common = {k: t for k, t in self.tensors.items() if k.partition(".")[0] not in PATHS}
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            path, _, rest = key.partition(".")
            if path in PATHS:
                found.setdefault(path, dict(common))[rest] = tensor
        rows = found.get("embed", {}).get(ROWS)
        if self.tied and rows is not None and not self._copied(found.get("head", {})):
            found["head"] = {TIED: rows, **found.get("head", {})}
        return {"embed": {}} if self.prompt else found

    @property
    def prompt(self) -> bool:
        """Whether it is rows in front of the tokens, at the embedding."""
        return bool(self.config.is_prompt_learning)

    def fits(self, file: Record, trainable: bool) -> bool:
        """Whether a file's tensors can take the place of this adapter's."""
        mine, theirs = ({k: t.shape for k, t in r.tensors.items()} for r in (self, file))
        combined = "combined" in (self.label, file.label) and self.prompt and file.prompt
        if self.label != file.label and not combined:  # one prompt, times a number, is as it was
            return False
        if self.config.method != "ADALORA":
            return mine == theirs
        if trainable and file.resumes:
            return self.room == file.room
        ranks = {key.partition(".")[0]: len(t) for key, t in file.tensors.items() if "E" in key}
        return all(self.room[path] in (ranks[path], file.room[path]) for path in ranks)

    def copies(self, path: str) -> bool:
        """Whether it puts a trained module in the place of the one at a path."""
        return self._copied(self.at.get(path, {}))

    @staticmethod
    def _copied(here: dict[str, Tensor]) -> bool:
        return any(key in COPIES for key in here)

    @property
    def ties(self) -> bool:
        """Whether it wishes to act at both ends of a tied weight, with all that it has there."""
        wish = getattr(self.config, "ensure_weight_tying", False)
        return bool(wish) or self.config.method == "TRAINABLE_TOKENS"

    @property
    def shared(self) -> dict[str, tuple[str, bool]]:
        """The tensors of a file that are others of it, at the other end of a tied weight; and
        whether they are transposed.
        """
        if not (self.tied and self.ties):
            return {}
        pairs = {
            "head.trainable_tokens_delta": ("embed.trainable_tokens_delta", False),
            "head.weight": ("embed.weight", False),
            "head.lora_A.weight": ("embed.lora_embedding_B", True),
            "head.lora_B.weight": ("embed.lora_embedding_A", True),
        }
        return {k: pair for k, pair in pairs.items() if {k, pair[0]} <= self.tensors.keys()}

    def ways(self, path: str) -> set[str]:
        """How it changes the weight of a layer of its own."""
        here = {k for k in self.at.get(path, {}) if f"{path}.{k}" not in self.shared}
        rows, copy = here & {ROWS}, here & set(COPIES)
        left = here - rows - copy - {TIED, BIAS, *FROZEN}
        return {w for w, has in (("rows", rows), ("copy", copy), ("matrix", left)) if has}

    @property
    def both(self) -> set[str]:
        """The ways in which it changes the embedding and the tied head alike."""
        if not self.tied:
            return set()
        every = self.ties
        return self.ways("embed") if every else self.ways("embed") & {"rows"}

    def ids(self, path: str) -> set[int]:
        """The tokens whose rows it puts in place."""
        here = self.at.get(path, {})
        own = self.config.token_indices if "trainable_tokens_delta" in here else ()
        beside = self.config.trainable_token_indices if {ROWS, TIED} & here.keys() else None
        return {*own, *(self._rows(beside) if beside else ())}

    @staticmethod
    def _rows(wanted: Any) -> list[int]:
        return list(wanted["embed"] if isinstance(wanted, dict) else wanted)

    def fold(self, path: str, w: Tensor, b: Tensor | None, base: dict[str, Tensor]) -> Any:
        """The weight and bias at a path with this adapter above what is there."""
        t = {k: v.to(w.dtype) for k, v in self.at[path].items()}
        flip = path == "embed"  # whose matrix is (out, in) transposed
        if (bias := t.pop(BIAS, None)) is not None:
            assert b is not None
            b = b + bias - base[f"{path}.bias"]
        rows, beneath = t.pop(ROWS, None), t.pop(TIED, None)
        if path == "head" and beneath is None:  # of tokens alone
            beneath = t.pop("trainable_tokens_delta", None)
        above = beneath is not None and "head.lora_A.weight" in self.shared
        if beneath is not None and not above:
            w = w.index_copy(0, torch.tensor(sorted(self.ids(path))), beneath)
        if self.copies(path):
            front = "" if "weight" in t else "ln_tuning_layers."
            tied = f"{path}.weight" in self.shared
            return t[f"{front}weight"], b if tied else t.get(f"{front}bias")
        w, origin = (v.T if flip else v for v in (w, base[f"{path}.weight"]))
        if t.keys() - set(FROZEN):
            w, b = RULES[self.config.method](t, self.config, w, b, origin)
        if rows is not None:
            ids = self._rows(self.config.trainable_token_indices)
            w, b = RULES["TRAINABLE_TOKENS"]({"trainable_tokens_delta": rows}, ids, w, b, origin)
        if above:
            w = w.index_copy(0, torch.tensor(sorted(self.ids(path))), beneath)
        return w.T if flip else w, b


def frozen(key: str) -> bool:
    """Whether a tensor of a file is never trained."""
    return key.rpartition(".")[2] in FROZEN
