"""A model with adapters beside its reference, and how they are compared."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checks import DivergenceError, near, need, owner, plain, same_bits, verify
from reference import Record, Reference, Refused
from torch import Tensor
from zoo import Net

from graftwork import GraftworkError
from graftwork.model.functional import get_peft_model_state_dict

Op = tuple[Any, ...]
DTYPES = {"float64": 1e-6, "float32": 3e-4, "bfloat16": 0.15}  # and how far outputs may differ
RATE = 0.05
FREE = ("a rank above the smaller", "another base model")  # told of what is loaded, or not


class Ground:
    """A model, what is said of it, and the folders that it was saved to.

    Args:
        seed: of the base's weights, of which of them trained before, and of the dtype.
        folder: an empty one.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        torch.manual_seed(seed)
        dtype = list(DTYPES)[seed % 3]
        tied = seed % 4 == 3
        net = Net(tied=tied).to(getattr(torch, dtype)).eval()
        for i, p in enumerate(net.parameters()):
            p.requires_grad_((seed >> i) % 2 == 0)
        names = {n for n, p in net.named_parameters() if p.requires_grad}
        base = {n: t.detach().clone() for n, t in net.state_dict().items()}
        self.model: Any = net
        self.net, self.reference = net, Reference(base, names, tied)
        self.tolerance, self.folder = DTYPES[dtype], folder
        self.files: dict[tuple[str, str], Record] = {}  # slot and adapter -> what is there
        self.raw: dict[str, dict[str, Tensor]] = {}  # adapter -> its tensors in the state dict
        self.modules = {n: id(m) for n, m in net.named_modules()}
        self.twin: tuple[Any, Reference, Any] | None = None
        self.gone: list[weakref.ref[Any]] = []
        self.counts: Counter[str] = Counter()

    def apply(self, op: Op) -> None:
        """Do an operation on both, and compare."""
        name, *arguments = op
        if not (self.reference.wrapped or name.startswith("attach")):
            return  # of a plain model nothing can be asked
        self.reference.warns = []
        torch.manual_seed(sum(self.counts.values()))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            getattr(self, name)(*arguments)
        self.counts[name] += 1
        loads = ("load", "swap", "attach_saved", "attach_broken")
        free = FREE if "cat" in op or name in loads else ()
        free = (*free, "ensure_weight_tying") if name in ("attach_broken", "swap") else free
        texts = [str(w.message) for w in seen]
        texts = [text for text in texts if not any(may in text for may in free)]
        wants = self.reference.warns
        fit = len(texts) == len(wants) and all(w in t for w, t in zip(wants, texts, strict=True))
        need(fit, f"warnings {texts}, not {wants}")
        self.verify()

    def both(self, expected: Callable[[], Any], real: Callable[[], Any]) -> bool:
        """Do what the reference allows, and see refused what it refuses."""
        try:
            expected()
        except Refused as refused:
            self.counts["refused"] += 1
            try:
                real()
            except GraftworkError as error:
                said = any(text in str(error) for text in str(refused).split("|"))
                need(said, f"the error should say {str(refused)!r}: {error}")
                return False
            raise DivergenceError(f"not refused: {refused}") from None
        try:
            real()
        except GraftworkError as error:
            raise DivergenceError(f"refused: {error}") from error
        return True

    # -- looking

    def shake(self, name: str) -> None:
        """Move a new adapter away from its start."""
        with torch.no_grad():
            for p in self.parameters(name):
                p.add_(torch.randn_like(p) * 0.3)
        self.adopt(name, fresh=True)

    def parameters(self, name: str) -> list[Tensor]:
        return [p for n, p in self.model.named_parameters() if owner(n, [name])]

    def adopt(self, name: str, fresh: bool = False) -> None:
        """Take over the bits of an adapter, which are new, or those of its file."""
        tensors = plain(get_peft_model_state_dict(self.model, adapter_name=name))
        record = self.reference.adapters[name]
        if fresh:
            record.take({k: t.clone() for k, t in tensors.items()})
        else:
            same_bits(tensors, record.tensors, f"{name!r} as it was loaded")
        every = self.model.state_dict()
        rooms = [(k, len(t)) for k, t in every.items() if k.endswith(f".adapters.{name}.adalora.E")]
        record.room = {k.removeprefix("base_model.model.").partition(".")[0]: n for k, n in rooms}
        self.raw[name] = {k: t.clone() for k, t in every.items() if owner(k, [name])}

    def near(self, value: Tensor, want: Tensor, what: str) -> None:
        near(value, want, self.tolerance, what)

    def take_written(self) -> None:
        """Take over the bits that merging wrote, which may differ in rounding."""
        every = self.model.get_base_model().state_dict()
        for path, tensors in self.reference.written.items():
            for key, want in tensors.items():
                real = every[f"{path}.base_layer.{key.rpartition('.')[2]}"]
                self.near(real, want, f"{key} as it was merged")
                tensors[key] = real.detach().clone()

    def verify(self) -> None:
        need(not any(gone() is not None for gone in self.gone), "deleted tensors are still there")
        self.gone = []
        verify(self.model, self.reference, self.raw, self.tolerance)
        if not self.reference.wrapped and self.modules:
            now = {n: id(m) for n, m in self.model.named_modules()}
            need(now == self.modules, "the user's own modules are back")
