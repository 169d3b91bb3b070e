"""P-tuning v2 (arXiv 2110.07602): softmax(q [P_k; K]') [P_v; V] in every self-attention, P_k and
P_v trained, or made by two layers, for every task and kind of model.

Where a model has an encoder and a decoder both get them, the encoder's at the front of the table;
the tokens of such an encoder keep the positions that they have.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .layers import is_encoder_decoder
from .prefix import PrefixTuningConfig


@dataclass
class PTuningV2Config(PrefixTuningConfig, method="P_TUNING_V2"):
    """Trained keys and values in every self-attention, of encoders too."""

    ENCODER = True

    def place(self, i: int) -> int:
        return i

    def for_peft(self, model: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        if is_encoder_decoder(model):
            raise ValueError(
                "PEFT's prefix tuning puts nothing into the encoder of an encoder-decoder, so a "
                "P_TUNING_V2 adapter of one cannot be written for it; leave compat out, or train a "
                "PREFIX_TUNING adapter"
            )
        names = [f.name for f in fields(PrefixTuningConfig) if f.init and f.name != "peft_type"]
        return PrefixTuningConfig(**{name: getattr(self, name) for name in names}), tensors
