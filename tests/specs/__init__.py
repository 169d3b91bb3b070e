"""What is particular in testing each method: one file a method, all of them collected here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from graftwork.testing.bench import Bench, Setup
from graftwork.testing.entry import Entry, Small
from graftwork.testing.layers import KINDS, Kind


@dataclass(frozen=True)
class Case:
    """One method with its options, small enough for layers of 6 to 12 channels.

    Args:
        config: builds the config, without targets.
        identity: whether it starts as the identity.
        main: whether it stands for its method where all pairs of methods are tested.
        row: its name in the matrix; that of the method where it is main.
        other: another config, where the same one cannot be active twice.
        call: arguments of every call, for four rows.
        needs: tags that a kind of layer must have.
        lacks: tags that it must not have.
        but: kinds at which it has no meaning.
        setup: what it needs around its adapters.
        alone: whether what it computes is all in its own tensors, so that every law is about it.
        model: builds the model of two blocks for the matrix; see ``Entry``.
        ends: the names of that model's embedding and output layer.
    """

    config: Callable[[], Any]
    identity: bool = True
    main: bool = False
    row: str = ""
    other: Callable[[], Any] | None = None
    call: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    lacks: str = ""
    but: str = ""
    setup: Setup = field(default_factory=Setup)
    alone: bool = True
    model: Callable[[bool], nn.Module] = Small
    ends: tuple[str, str] = ("embed", "head")

    @property
    def kinds(self) -> list[str]:
        """The kinds of layers at which it has a meaning."""
        return [kind for kind in KINDS if self.applies(kind)]

    def applies(self, kind: str) -> bool:
        """Whether it has a meaning at a kind of layer."""
        tags = KINDS[kind].tags
        wanted, barred = set(self.needs.split()), set(self.lacks.split())
        return wanted <= tags and not barred & tags and kind not in self.but.split()


@dataclass(frozen=True)
class Parity:
    """One comparison with the real peft.

    Args:
        model: a key of ``tiny.MODELS``.
        kind: the config class, of the same name in both libraries.
        options: its fields.
        name: what tells it from others of this model and kind.
        train: whether 20 steps of training are compared too (with a language model).
        reads: whether what PEFT writes is read, and answers alike.
        writes: whether what is written here is read by PEFT, and answers alike.
        shake: how far the trained tensors are moved from the start.
        call: arguments of every call, for two rows.
    """

    model: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    train: bool = False
    reads: bool = True
    writes: bool = True
    shake: float = 0.1
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """For pytest."""
        words = [self.kind.removesuffix("Config"), self.model, self.name]
        return "-".join(word for word in words if word)


_FILES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
_SPECS = [import_module(f"specs.{name}") for name in _FILES]
METHODS: dict[str, Case] = {k: v for spec in _SPECS for k, v in spec.CASES.items()}
PARITY: list[Parity] = [p for spec in _SPECS for p in getattr(spec, "PARITY", [])]
CASES = [(m, k) for m, case in METHODS.items() if case.alone for k in case.kinds]
MAIN = [m for m, case in METHODS.items() if case.main]
# the rows of the matrix
ROWS = {
    case.row or case.config().method: Entry(
        case.config, case.kinds, case.call, case.other, case.setup, case.model, case.ends
    )
    for case in METHODS.values()
    if case.main or case.row
}


def bench(kind: str | Kind, *methods: str) -> Bench:
    """Methods at one kind of layer, the lowest first."""
    cases = [METHODS[m] for m in methods]
    call = {key: value for case in cases for key, value in case.call.items()}
    return Bench(kind, [case.config() for case in cases], call, [case.setup for case in cases])
