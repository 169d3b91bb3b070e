"""The options of LoRA's variants, with PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..config import check_choice, check_rank

O = TypeVar("O")  # noqa: E741


@dataclass
class KasaConfig:
    """KaSA: how much its two penalties weigh."""

    beta: float = 1e-4  # of the singular values: sum d^2
    gamma: float = 1e-3  # of what is not orthogonal: ||B'B - I|| + ||A A' - I||

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            check_positive(getattr(self, name), name, or_zero=True)


@dataclass
class BdLoraConfig:
    """BD-LoRA: at which layers A, at which B consists of blocks."""

    target_modules_bd_a: list[str] | None = None  # parts of paths: A has blocks there
    target_modules_bd_b: list[str] | None = None  # parts of paths: B has blocks there
    nblocks: int = 1  # blocks of a factor
    match_strict: bool = True  # every adapted layer must be meant by one of the two

    def __post_init__(self) -> None:
        check_rank(self.nblocks, "nblocks")
        if both := set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()):
            raise ValueError(
                f"{sorted(both)} stand in target_modules_bd_a and in target_modules_bd_b; either A "
                "or B consists of blocks"
            )


@dataclass
class VeloraConfig:
    """VeLoRA: how the inputs are compressed that are kept for the backward pass."""

    num_groups: int = 64  # numbers that are kept of each input
    scale: float = 1.0  # of what is made of them again
    init_type: str = "batch_average"  # the direction: of each batch, "batch_average_once", "random"

    def __post_init__(self) -> None:
        check_rank(self.num_groups, "num_groups")
        check_positive(self.scale, "scale")
        names = ("batch_average", "batch_average_once", "random")
        check_choice(self.init_type, "init_type", names)


@dataclass
class MontecloraConfig:
    """MonteCLoRA: how A is sampled in training, and how much its penalties weigh."""

    num_samples: int = 8  # whose weighted mean is taken
    use_entropy: bool = False  # also keep their weights apart from a single one: sum w^2
    dirichlet_prior: float = 0.1  # of the weights
    sample_scaler: float = 1e-4  # of the noise
    kl_loss_weight: float = 1e-5  # of the penalty
    buffer_size: int = 150  # PEFT's, which draws ahead; here draws are made as they are needed

    def __post_init__(self) -> None:
        for name in ("num_samples", "buffer_size"):
            check_rank(getattr(self, name), name)
        check_positive(self.dirichlet_prior, "dirichlet_prior")


@dataclass
class ArrowConfig:
    """Arrow: how a token chooses among adapters; ``create_arrow_model`` names these."""

    top_k: int = 3  # adapters for each token
    router_temperature: float = 1.0  # of the softmax over adapters
    use_gks: bool = False  # take the mean of general adapters away from each (GenKnowSub)
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None  # of the power iteration's start

    def __post_init__(self) -> None:
        check_rank(self.top_k, "top_k")
        check_positive(self.router_temperature, "router_temperature")


def check_positive(value: Any, name: str, or_zero: bool = False) -> None:
    """Refuse what is no number above zero."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{name}={value!r} must be a number {'from' if or_zero else 'above'} zero")


def options_of(given: Any, kind: type[O]) -> O | None:
    """A config's sub-config, which may be a dictionary out of a file."""
    if given is None or isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"a {type(given).__name__} stands where a {kind.__name__} is expected")
    every = fields(kind)  # type: ignore[arg-type]
    made = kind(**{f.name: given[f.name] for f in every if f.init and f.name in given})
    for f in every:
        if not f.init and f.name in given:
            setattr(made, f.name, given[f.name])
    return made
