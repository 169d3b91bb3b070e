"""What the command line takes where the user says nothing: for each method the learning rates and
the options that were measured to learn (benchmarks/sst2.py, benchmarks/prompts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """What to train a method with.

    Args:
        rate: peak learning rate for classification.
        language_rate: peak learning rate for language models.
        head_rate: peak learning rate of a new head, which starts from noise and so may take longer
            strides than an update of weights.
        options: values of the method's fields.
        base_dropout: dropout inside the base model; None: its own.
    """

    rate: float = 1e-3
    language_rate: float = 5e-4
    head_rate: float = 5e-3
    options: Mapping[str, Any] = field(default_factory=dict)
    base_dropout: float | None = None


ALL_LINEAR = {"target_modules": "all-linear"}
TWENTY = {"num_virtual_tokens": 20}
# what is in front is read at every place of every layer: the base's own noise drowns its gradient
PREFIX = Defaults(1e-1, 3e-1, 1e-2, {**TWENTY, "init_weights": "small"}, 0.0)
TEXT = {**TWENTY, "prompt_tuning_init": "TEXT"}  # begins with the token that a classifier reads
DEFAULTS = {
    "LORA": Defaults(options={**ALL_LINEAR, "r": 8, "lora_alpha": 16}),
    "ADALORA": Defaults(2e-3, 1e-3, options={**ALL_LINEAR, "lora_alpha": 32}),
    "IA3": Defaults(1e-2, 5e-3),
    "TRAINABLE_TOKENS": Defaults(1e-3, 1e-3),
    "PROMPT_TUNING": Defaults(1e-2, 3e-1, 2e-2, TEXT, 0.0),
    "P_TUNING": Defaults(1e-3, 2e-2, 2e-2, TWENTY, 0.0),
    "PREFIX_TUNING": PREFIX,
    "P_TUNING_V2": PREFIX,
    "CARTRIDGE": Defaults(1e-1, 3e-1, 1e-2, TWENTY, 0.0),
    "MULTITASK_PROMPT_TUNING": Defaults(1e-1, 3e-1, 2e-2, TWENTY, 0.0),
    "ADAPTION_PROMPT": Defaults(1e-1, 1e-1, 1e-2, base_dropout=0.0),
}


def defaults(name: str) -> Defaults:
    """The defaults of a method; a method without measured ones gets the usual."""
    return DEFAULTS.get(name) or Defaults()
