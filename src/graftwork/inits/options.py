"""The options of the starts that data or a quantiser decide, with PEFT's names."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ..fields import Options, between, choice, positive, whole


@dataclass
class EvaConfig(Options):
    """EVA: how ranks are given out, and which inputs count."""

    rho: float = between(2.0, 1, inf)  # a layer gets at most rho r directions
    tau: float = between(0.99, 0, 1)  # cosine with the last one above which one has converged
    use_label_mask: bool = True  # positions whose label is label_mask_value do not count
    label_mask_value: int = -100  # the label that is none
    whiten: bool = False  # directions are divided by the root of their singular value
    adjust_scaling_factors: bool = True  # lora_alpha follows a changed rank: the scale stays


@dataclass
class CordaConfig(Options):
    """CorDA: which directions, and files that spare a second run over the data."""

    cache_file: str | None = None  # the start itself, for one rank
    covariance_file: str | None = None  # the inputs' covariances, for any rank
    corda_method: str = choice("ipm", "kpm")  # "ipm": the strongest directions; "kpm": the weakest
    verbose: bool = False  # PEFT's progress bar; nothing is printed
    use_float16_for_covariance: bool = False  # less memory, less exact
    prune_temporary_fields: bool = True  # PEFT's; there are none


@dataclass
class LoraGAConfig(Options):
    """LoRA-GA: which of the gradient's directions go to A and to B, and how B is scaled."""

    direction: str = choice("ArB2r", "A2rBr", "ArBr", "random")  # which go to A, which to B
    scale: str = choice("stable", "weight_svd", "gd_scale", "unit")  # how B is scaled
    stable_gamma: int = positive(16)  # of "stable": by out^(1/4) / sqrt(stable_gamma)


@dataclass
class LoftQConfig(Options):
    """LoftQ: the quantiser, and how often it and the SVD take turns."""

    loftq_bits: int = choice(4, 8)  # 4: NF4 in blocks of 64; 8: int8 by rows
    loftq_iter: int = whole(1)  # turns
