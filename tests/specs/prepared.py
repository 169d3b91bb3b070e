"""The starts that data decide: CorDA, LoRA-GA and EVA; more is in tests/test_starts.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from graftwork import (
    LoraConfig,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from graftwork.engine.site import kind_of
from graftwork.inits import MATRICES
from graftwork.testing.bench import Setup
from specs import Case


def at_matrices(prepare: Callable[..., None]) -> Callable[[nn.Module, Any, Tensor], None]:
    """Prepare a model that has layers which start from data; elsewhere a LoRA starts plainly."""

    def before(model: nn.Module, config: Any, x: Tensor) -> None:
        names = tuple(config.target_modules or ())
        layers = [m for path, m in model.named_modules() if path.endswith(names)]
        if any(kind_of(getattr(m, "base_layer", m)) in MATRICES for m in layers):
            prepare(model, config, x)

    return before


def corda(model: nn.Module, config: Any, x: Tensor) -> None:
    preprocess_corda(model, config, lambda: model(x))


def lora_ga(model: nn.Module, config: Any, x: Tensor) -> None:
    def train_step() -> None:
        y = model(x)
        y = y if isinstance(y, Tensor) else y.logits
        y.square().sum().backward()

    preprocess_loraga(model, config, train_step)


def eva(model: Any, name: str, x: Tensor) -> None:
    initialize_lora_eva_weights(
        model, [x], forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, adapter_name=name,
    )  # fmt: skip


def lora(how: str) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, init_lora_weights=how)


OTHERS = "conv1d conv2d conv2d_groups conv2d_depthwise conv3d"
CASES = {
    how: Case(partial(lora, how), row=row, setup=setup, lacks="ids fold", but=OTHERS)
    for how, row, setup in (
        ("corda", "CorDA", Setup(before=at_matrices(corda))),
        ("lora_ga", "LoRA-GA", Setup(before=at_matrices(lora_ga))),
        ("eva", "EVA", Setup(after=eva)),
    )
}
