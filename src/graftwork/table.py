"""The methods, as data: the command line, the documentation and the tests read this table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import did_you_mean

if TYPE_CHECKING:
    from .config import PeftConfig


@dataclass
class Method:
    """One row: where a method's config class lives, and what the method does in one line."""

    name: str
    where: str  # "module:ConfigClass"
    about: str
    paper: str = ""

    @property
    def module(self) -> str:
        """Where the config class is, inside this package."""
        return self.where.partition(":")[0].removeprefix("graftwork.")

    @cached_property
    def config(self) -> type[PeftConfig]:
        module, _, name = self.where.partition(":")
        found: type[PeftConfig] = getattr(import_module(module), name)
        return found


# name | module: config class | what it does | paper
_ROWS = """
LORA | lora_config: LoraConfig | low-rank update W + s B A; also DoRA, rsLoRA, PiSSA, ... | 2106.09685
ADALORA | adalora: AdaLoraConfig | low-rank update whose ranks are learned | 2303.10512
LOHA | loha: LoHaConfig | Hadamard product of two low-rank matrices | 2108.06098
VERA | vera: VeraConfig | two learned vectors around shared random projections | 2310.11454
IA3 | ia3: IA3Config | one learned gain per channel | 2205.05638
TRAINABLE_TOKENS | tokens: TrainableTokensConfig | some embedding rows, learned anew |
"""


def _row(line: str) -> Method:
    name, where, about, paper = (word.strip() for word in line.split("|"))
    module, config = where.split(": ")
    return Method(name, f"graftwork.methods.{module}:{config}", about, paper)


METHODS = {row.name: row for row in map(_row, _ROWS.strip().splitlines())}
CONFIGS = {row.where.partition(":")[2]: row for row in METHODS.values()}  # by their class's name


def method(name: str) -> Method:
    """The row of a method.

    Raises:
        ValueError: no method has that name.
    """
    key = getattr(name, "value", str(name)).removeprefix("PeftType.")
    if key not in METHODS:
        raise ValueError(
            f"graftwork has no method {key!r}{did_you_mean(key, METHODS)} It has {sorted(METHODS)}"
        )
    return METHODS[key]


def register(name: str, config: type[PeftConfig], about: str, paper: str = "") -> None:
    """Add a method of your own; its config class gives the adapter class and the fields.

    Args:
        name: the ``peft_type`` in files, in capitals.
        config: the config class.
        about: what the method does, in one line.
        paper: an arXiv number or an address.
    """
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already; choose another name")
    row = Method(name, f"{config.__module__}:{config.__qualname__}", about, paper)
    row.__dict__["config"] = config
    METHODS[name] = row
