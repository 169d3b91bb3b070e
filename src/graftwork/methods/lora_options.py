"""The options of LoRA's variants, with PEFT's names."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..fields import Options, choice, not_negative, positive, whole


@dataclass
class KasaConfig(Options):
    """KaSA: how much its two penalties weigh."""

    beta: float = not_negative(1e-4)  # of the singular values: sum d^2
    gamma: float = not_negative(1e-3)  # of what is not orthogonal: ||B'B - I|| + ||A A' - I||


@dataclass
class BdLoraConfig(Options):
    """BD-LoRA: at which layers A, at which B consists of blocks."""

    target_modules_bd_a: list[str] | None = None  # parts of paths: A has blocks there
    target_modules_bd_b: list[str] | None = None  # parts of paths: B has blocks there
    nblocks: int = whole(1)  # blocks of a factor
    match_strict: bool = True  # every adapted layer must be meant by one of the two

    def __post_init__(self) -> None:
        super().__post_init__()
        if both := set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()):
            raise ValueError(
                f"{sorted(both)} stand in target_modules_bd_a and in target_modules_bd_b; either A "
                "or B consists of blocks"
            )


@dataclass
class VeloraConfig(Options):
    """VeLoRA: how the inputs are compressed that are kept for the backward pass."""

    num_groups: int = whole(64)  # numbers that are kept of each input
    scale: float = positive(1.0)  # of what is made of them again
    init_type: str = choice("batch_average", "batch_average_once", "random")  # the direction


@dataclass
class MontecloraConfig(Options):
    """MonteCLoRA: how A is sampled in training, and how much its penalties weigh."""

    num_samples: int = whole(8)  # whose weighted mean is taken
    use_entropy: bool = False  # also keep their weights apart from a single one: sum w^2
    dirichlet_prior: float = positive(0.1)  # of the weights
    sample_scaler: float = 1e-4  # of the noise
    kl_loss_weight: float = 1e-5  # of the penalty
    buffer_size: int = whole(150)  # PEFT's, which draws ahead; here draws are made when needed


@dataclass
class LoraRuntimeConfig(Options):
    """PEFT's, for machines: adapters here stay where their layer is."""

    ephemeral_gpu_offload: bool = False  # not available

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ephemeral_gpu_offload:
            raise ValueError("ephemeral_gpu_offload is not available; leave it out")


@dataclass
class ArrowConfig(Options):
    """Arrow: how a token chooses among adapters; ``create_arrow_model`` names these."""

    top_k: int = whole(3)  # adapters for each token
    router_temperature: float = positive(1.0)  # of the softmax over adapters
    use_gks: bool = False  # take the mean of general adapters away from each (GenKnowSub)
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None  # of the power iteration's start
