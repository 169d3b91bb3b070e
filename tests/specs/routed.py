"""Poly and Lily, whose update depends on the row or on the input."""

import torch

from graftwork import LilyConfig, PolyConfig
from specs import Case, Parity

TASKS = {"task_ids": torch.tensor([0, 1, 1, 0])}
TWO = {"task_ids": torch.tensor([1, 0])}
CASES = {
    "poly": Case(lambda: PolyConfig(r=2, n_tasks=2), main=True, call=TASKS, lacks="fold"),
    "poly_one": Case(lambda: PolyConfig(r=2, n_splits=1)),
    "poly_random": Case(
        lambda: PolyConfig(r=2, n_tasks=2, n_splits=2, init_weights=False),
        identity=False, call=TASKS, lacks="fold depthwise", but="conv2d_groups",
    ),
    "lily": Case(lambda: LilyConfig(r=2, num_B=3), main=True, lacks="fold"),
    "lily_random": Case(lambda: LilyConfig(r=2, init_weights=False), identity=False, lacks="fold"),
}  # fmt: skip
POLY = {"task_type": "CAUSAL_LM", "r": 2, "n_tasks": 2}  # PEFT passes task ids with a task alone
PARITY = [
    Parity("llama", "PolyConfig", {**POLY, "target_modules": ["q_proj", "down_proj"]}, call=TWO),
    Parity("llama", "PolyConfig",
           {**POLY, "n_skills": 3, "n_splits": 2, "target_modules": ["v_proj"]}, "splits",
           call=TWO),
    Parity("llama", "LilyConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}, train=True),
    Parity("llama", "LilyConfig",
           {"r": 3, "stride_A": 2, "num_B": 4, "scaling": 2.0, "target_modules": ["q_proj"]},
           "strides", train=True),
]  # fmt: skip
