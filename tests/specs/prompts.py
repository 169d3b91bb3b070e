"""Virtual tokens, and keys and values in front of a model's; more is in tests/prompts/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graftwork import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
)
from graftwork.testing.blocks import blocks
from specs import Case


def case(first: Callable[[], Any], other: Callable[[], Any], **options: Any) -> Case:
    """A config of a method, and another one of another length."""
    return Case(
        first, row=first().method, needs="blocks", alone=False, other=other, model=blocks,
        ends=("embed_tokens", "lm_head"), **options,
    )  # fmt: skip


def prompt(kind: Callable[..., Any], n: int, **options: Any) -> Callable[[], Any]:
    return lambda: kind(task_type="CAUSAL_LM", num_virtual_tokens=n, **options)


def cpt(n: int) -> Callable[[], Any]:
    far = {"opt_projection_epsilon": 1e3, "opt_projection_format_epsilon": 1e3}
    types = [1, 2, 3, 4][:n]
    return prompt(CPTConfig, n, cpt_token_ids=[5, 2, 7, 1][:n], cpt_tokens_type_mask=types, **far)


def gated(n: int, layers: int) -> Callable[[], Any]:
    return lambda: AdaptionPromptConfig(adapter_len=n, adapter_layers=layers)


TASKS = {"task_ids": torch.tensor([0, 1, 1, 0])}
TWO = {"num_tasks": 2, "num_ranks": 2}
CASES = {
    "prompt": case(prompt(PromptTuningConfig, 3), prompt(PromptTuningConfig, 5)),
    "p_tuning": case(
        prompt(PromptEncoderConfig, 3),
        prompt(PromptEncoderConfig, 5, encoder_reparameterization_type="LSTM"),
    ),
    "multitask": case(
        prompt(MultitaskPromptTuningConfig, 3, **TWO),
        prompt(MultitaskPromptTuningConfig, 5, **TWO), call=TASKS,
    ),
    "cpt": case(cpt(3), cpt(4)),
    "prefix": case(
        prompt(PrefixTuningConfig, 3), prompt(PrefixTuningConfig, 5, prefix_projection=True)
    ),
    "p_tuning_v2": case(
        prompt(PTuningV2Config, 3, prefix_projection=True), prompt(PTuningV2Config, 5)
    ),
    "cartridge": case(prompt(CartridgeConfig, 3), prompt(CartridgeConfig, 5, num_frozen_tokens=2)),
    "adaption": case(gated(3, 2), gated(5, 1)),
}  # fmt: skip
