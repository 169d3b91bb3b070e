"""Multitask prompt tuning (arXiv 2303.02861): the model reads [E * (u_t v_t); x] in a row of task
t, E shared, u_t v_t of low rank and of the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Site
from ..errors import StateError
from ..fast.rows import each
from ..fields import choice, whole
from .config import PromptConfig
from .tokens import PromptTuningConfig, Tokens

SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
INITS = ("TEXT", "SAMPLE_VOCAB", "LABELS", *SOURCES)


class Tasks(Tokens):
    """E (total, width), u (tasks, total, r), v (tasks, r, width)."""

    keys = {**Tokens.keys, "u": "prefix_task_cols", "v": "prefix_task_rows"}

    def __init__(self, config: MultitaskPromptTuningConfig, site: Site) -> None:
        super().__init__(config, site)
        self.decodes = config.num_transformer_submodules == 2
        total, width = self.E.shape
        self.u = nn.Parameter(torch.empty(config.num_tasks, total, config.num_ranks))
        self.v = nn.Parameter(torch.empty(config.num_tasks, config.num_ranks, width))

    def start(self) -> None:
        super().start()
        for factor in (self.u, self.v):
            factor.copy_(torch.empty(factor.shape, device="cpu").normal_(0, 0.02))
        if self.config.prompt_tuning_init in SOURCES and not self.config.inference_mode:
            for name, value in self.config.source().items():
                mine = getattr(self, name)
                if mine.shape != value.shape:
                    path = self.config.prompt_tuning_init_state_dict_path
                    raise ValueError(
                        f"{self.keys[name]} is {tuple(value.shape)} in {path}, and "
                        f"{tuple(mine.shape)} here; num_virtual_tokens, num_ranks and the model "
                        "must be as there, and num_tasks=1 where one task's or the mean is taken"
                    )
                mine.copy_(value)

    def rows(self, context: dict[str, Any], batch: int) -> Tensor:
        if len(self.u) == 1:
            return super().rows(context, batch)
        tasks = each(context, "task_ids", batch, "multitask prompt tuning").to(self.u.device)
        if not torch.compiler.is_compiling() and int(tasks.max()) >= len(self.u):
            raise StateError(f"task_ids holds {int(tasks.max())}; there are {len(self.u)} tasks")
        return self.E * (self.u[tasks] @ self.v[tasks])

    def whole(self) -> Tensor:
        if len(self.u) > 1:
            raise StateError(
                f"a multitask prompt of {len(self.u)} tasks has other rows for each task; it can "
                "be combined by 'cat' with others of as many tasks alone"
            )
        return self.E * (self.u[0] @ self.v[0])


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig, method="MULTITASK_PROMPT_TUNING"):
    """One prompt, and a change of low rank for each task: model(..., task_ids=), one a row.

    Args:
        prompt_tuning_init: where it starts: as prompt tuning, RANDOM, TEXT, SAMPLE_VOCAB or LABELS;
            or at a trained one, with the mean of its tasks, AVERAGE_SOURCE_TASKS, with one of them,
            EXACT_SOURCE_TASK, or with none, ONLY_SOURCE_SHARED.
    """

    prompt_tuning_init: str = choice("RANDOM", *INITS)
    prompt_tuning_init_state_dict_path: str | None = None  # the trained one: a file or a folder
    prompt_tuning_init_task: int = 0  # which of its tasks, of "EXACT_SOURCE_TASK"
    num_ranks: int = whole(1)  # r
    num_tasks: int = whole(1)  # tasks

    BEYOND = PromptConfig.BEYOND | {"prompt_tuning_init_labels"}
    CONTEXT = ("task_ids",)
    MADE = Tasks

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, path = self.prompt_tuning_init, self.prompt_tuning_init_state_dict_path
        if kind in SOURCES and path is None and not self.inference_mode:
            raise ValueError(
                f"prompt_tuning_init={getattr(kind, 'value', kind)!r} needs "
                "prompt_tuning_init_state_dict_path, the file of a trained multitask prompt"
            )

    def source(self) -> dict[str, Tensor]:
        """E, u and v of the trained one, as far as they are wanted."""
        found = read(Path(str(self.prompt_tuning_init_state_dict_path)))
        out = {"E": found["prompt_embeddings"]}
        if self.prompt_tuning_init != "ONLY_SOURCE_SHARED":
            u, v = found["prefix_task_cols"], found["prefix_task_rows"]
            if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                return {**out, "u": u.mean(0, keepdim=True), "v": v.mean(0, keepdim=True)}
            if not 0 <= self.prompt_tuning_init_task < len(u):
                raise ValueError(
                    f"prompt_tuning_init_task={self.prompt_tuning_init_task}; the trained prompt "
                    f"has the tasks 0 to {len(u) - 1}"
                )
            one = slice(self.prompt_tuning_init_task, self.prompt_tuning_init_task + 1)
            out |= {"u": u[one], "v": v[one]}
        return out


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of an adapter's folder; of a pickle only tensors."""
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    if path.suffix == ".safetensors":
        from ..files import mapped

        return mapped.read(path)[0]
    from ..files.pickled import unpickled

    return unpickled(path)
