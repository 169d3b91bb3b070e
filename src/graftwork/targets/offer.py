"""What a model offers to adapters, indexed once, and the table of it that errors show."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ..engine.site import Standing, kind_of
from ..engine.tree import inside, mark, parameters, walk
from ..errors import TargetError
from .replicas import there


@dataclass(frozen=True)
class Target:
    """A place for an adapter: a layer, or one parameter of a module."""

    path: str
    module: nn.Module
    parameter: str | None = None  # None: the layer's own weight

    @property
    def name(self) -> str:
        """The full name of the layer or parameter."""
        return f"{self.path}.{self.parameter}" if self.parameter else self.path


class Offer:
    """The modules of a model by original path."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.repeated = there(model)
        spare = tuple(f"{p}.{n}." for p, r in self.repeated.items() for n in r.spare())
        every = ((p, m) for p, m in walk(model) if p and not f"{p}.".startswith(spare))
        self.modules: dict[str, nn.Module] = {path: inside(m) for path, m in every}
        self.by_leaf: dict[str, list[str]] = {}
        for path in self.modules:
            self.by_leaf.setdefault(leaf(path), []).append(path)
        self.model_type = str(getattr(getattr(model, "config", None), "model_type", ""))

    @cached_property
    def ends(self) -> dict[str, list[str]]:
        """Path of a layer with a tied weight -> the paths of the others that have it."""
        groups: dict[Any, list[str]] = {}
        blocks = tuple(f"{path}." for path in self.repeated)  # copies are no ends
        for name, p in parameters(self.model):
            path, _, own = name.rpartition(".")
            if own == "weight" and path and not path.startswith(blocks):
                groups.setdefault(mark(p), []).append(path)
        layers = self.modules
        return {
            path: [p for p in group if layers[p] is not layers[path]]
            for group in groups.values()
            for path in group
        }

    def ending_with(self, entry: str) -> list[str]:
        """The paths that are ``entry`` or end with it behind a dot."""
        return [
            p for p in self.by_leaf.get(leaf(entry), ()) if p == entry or p.endswith(f".{entry}")
        ]

    def targets(self, path: str) -> list[Target]:
        """The places that a path stands for; attention with weights of its own has several."""
        module = self.modules[path]
        parent_path, _, name = path.rpartition(".")
        if isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
            own = dict(module.named_parameters())
            return [Target(path, module, n) for n in [*names, "out_proj.weight"] if n in own]
        if kind_of(module) is None:
            return []
        parent = self.modules.get(parent_path)
        if isinstance(
            parent, nn.MultiheadAttention
        ):  # it reads its child's weight and never calls it
            return [Target(parent_path, parent, f"{name}.weight")]
        return [Target(path, module)]

    def parameters(self) -> dict[str, Target]:
        """Every single parameter by its full name, as a place for an adapter."""
        found = {}
        for path, module in self.modules.items():
            own = self.targets(path) if kind_of(module) is not None else []
            for name, p in module._parameters.items():
                if p is not None:
                    target = Target(path, module, name)
                    found[f"{path}.{name}"] = own[0] if own and name == "weight" else target
        return found

    def short(self, paths: list[str]) -> set[str]:
        """Names that choose these layers and no others: last names where those suffice."""
        same = {n: [p for p in at if self.adaptable(p)] for n, at in self.by_leaf.items()}
        return {leaf(p) if set(same[leaf(p)]) <= set(paths) else p for p in paths}

    def adaptable(self, path: str) -> bool:
        """Whether an adapter can sit there."""
        return bool(self.targets(path))

    def first_embedding(self) -> str | None:
        """The path of the input embedding, where the model says which one it is or has just one."""
        getter = getattr(self.model, "get_input_embeddings", None)
        try:
            wanted = getter() if callable(getter) else None
        except NotImplementedError:  # transformers' answer of a model of sounds
            return None
        tables = [p for p, m in self.modules.items() if isinstance(m, nn.Embedding)]
        chosen = [p for p in tables if wanted is not None and self.modules[p] is inside(wanted)]
        return (chosen or tables)[0] if chosen or len(tables) == 1 else None

    def input_embedding(self) -> str:
        """The path of the input embedding.

        Raises:
            TargetError: the model does not say which one it is.
        """
        if (path := self.first_embedding()) is None:
            raise TargetError(f"it is not known which embedding is the input's. {self.table()}")
        return path

    def table(self) -> str:
        """``q_proj x32 Linear(4096, 4096)``: a line for each name of an adaptable layer."""
        rows: Counter[str] = Counter()
        for path, module in self.modules.items():
            if kind := kind_of(module):
                rows[f"{leaf(path)} x{{}} {kind(Standing(module)).describe()}"] += 1
            elif isinstance(module, nn.MultiheadAttention):
                rows[f"{leaf(path)} x{{}} MultiheadAttention({module.embed_dim})"] += 1
            for name, p in module._parameters.items() if kind is None else ():
                if p is not None and p.ndim > 2:
                    size = ", ".join(map(str, p.shape))
                    rows[f"{leaf(path)}.{name} x{{}} parameter({size})"] += 1
        lines = ["  " + row.format(n) for row, n in rows.items()]
        more = [f"  ... and {len(lines) - 24} more"] if len(lines) > 24 else []
        if not lines:
            return "The model has no linear, convolution or embedding layer."
        return "The model offers:\n" + "\n".join(lines[:24] + more)


def leaf(path: str) -> str:
    """The last name of a path."""
    return path.rpartition(".")[2]
