"""The options of the starts that data or a quantiser decide, with PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config import check_choice, check_rank

O = TypeVar("O")  # noqa: E741


@dataclass
class EvaConfig:
    """EVA: how ranks are given out, and which inputs count."""

    rho: float = 2.0  # a layer gets at most rho r directions
    tau: float = 0.99  # a direction has converged when its cosine with the last one is above
    use_label_mask: bool = True  # positions whose label is label_mask_value do not count
    label_mask_value: int = -100  # the label that is none
    whiten: bool = False  # directions are divided by the root of their singular value
    adjust_scaling_factors: bool = True  # lora_alpha follows a changed rank: the scale stays

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"rho={self.rho} is below 1: a layer may have rho times its rank")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau} is a cosine between 0 and 1; try tau=0.99")


@dataclass
class CordaConfig:
    """CorDA: which directions, and files that spare a second run over the data."""

    cache_file: str | None = None  # the start itself, for one rank
    covariance_file: str | None = None  # the inputs' covariances, for any rank
    corda_method: str = "ipm"  # "ipm": the strongest directions; "kpm": the weakest
    verbose: bool = False  # PEFT's progress bar; nothing is printed
    use_float16_for_covariance: bool = False  # less memory, less exact
    prune_temporary_fields: bool = True  # PEFT's; there are none

    def __post_init__(self) -> None:
        check_choice(self.corda_method, "corda_method", ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """LoRA-GA: which of the gradient's directions go to A and to B, and how B is scaled."""

    direction: str = "ArB2r"  # or "A2rBr", "ArBr", "random"
    scale: str = "stable"  # or "weight_svd", "gd_scale", "unit"
    stable_gamma: int = 16  # of "stable": B is scaled by out^(1/4) / sqrt(stable_gamma)

    def __post_init__(self) -> None:
        check_choice(self.direction, "direction", ("ArBr", "A2rBr", "ArB2r", "random"))
        check_choice(self.scale, "scale", ("stable", "weight_svd", "gd_scale", "unit"))
        if self.stable_gamma <= 0:
            raise ValueError(f"stable_gamma={self.stable_gamma} must be positive; try 16")


@dataclass
class LoftQConfig:
    """LoftQ: the quantiser, and how often it and the SVD take turns."""

    loftq_bits: int = 4  # 4: NF4 in blocks of 64; 8: int8 by rows
    loftq_iter: int = 1  # turns

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ValueError(f"loftq_bits={self.loftq_bits!r} is not known; it is one of [4, 8]")
        check_rank(self.loftq_iter, "loftq_iter")


def options(given: Any, kind: type[O]) -> O:
    """A config's sub-config, which may be absent, or a dictionary out of a file."""
    if isinstance(given, kind):
        return given
    if given and not isinstance(given, Mapping):
        raise TypeError(f"a {type(given).__name__} stands where a {kind.__name__} is expected")
    return kind(**(given or {}))
