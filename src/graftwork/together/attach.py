"""The adapters of runs, put into one model; refused where they cannot be in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..engine.inject import switch_of
from ..errors import StateError, TrainingError
from ..hooks import Hooks
from ..model.functional import user_model
from ..model.peft_model import PeftModel
from ..model.tasks import get_peft_model
from .runs import Run
from .streams import Stream


def check(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot be trained together.

    Raises:
        ValueError: there is none, or two have one name.
        TrainingError: a method cannot be in a mixed batch.
    """
    if not runs:
        raise ValueError("train_together got no runs; give [Run('a', LoraConfig(r=8)), ...]")
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two runs are called {twice[0]!r}; each needs a name of its own")
    for run in runs:
        if run.config is not None:
            need_mixable(run.name, run.config)


def need_mixable(name: str, config: PeftConfig) -> None:
    """Refuse a method whose part of the loss is that of a whole batch.

    Raises:
        TrainingError: it is one.
    """
    if type(config).after is not Hooks.after:
        raise TrainingError(
            f"run {name!r}: {config.method} computes its loss from all rows of a batch, and here "
            "the rows are those of several runs; train it alone"
        )


def attach(model: nn.Module, runs: Sequence[Run]) -> tuple[PeftModel, dict[str, Stream]]:
    """The model with all adapters, each started from its run's seed, and what they draw from next.

    Raises:
        StateError: a run without a config names an adapter that the model does not have.
    """
    inner = user_model(model)
    fresh = switch_of(inner) is None
    added: list[str] = []
    streams = {}
    root: Any = None if fresh else model if isinstance(model, PeftModel) else None
    root = PeftModel.around(inner) if root is None and not fresh else root
    try:
        for run in runs:
            with torch.random.fork_rng():
                torch.manual_seed(run.seed)
                root = _one(root, inner, run)
                if run.config is not None:
                    added.append(run.name)
                need_mixable(run.name, root.peft_config[run.name])
                streams[run.name] = Stream(run.seed, torch.get_rng_state())
    except BaseException:
        detach(root, added, fresh)
        raise
    return root, streams


def detach(model: PeftModel | None, added: Sequence[str], fresh: bool) -> None:
    """Take adapters away again, and leave the model as it was."""
    if model is None or not added:
        return
    if fresh:
        model.base_model.unload()
    else:
        model.delete_adapter(list(added))


def _one(root: PeftModel | None, inner: nn.Module, run: Run) -> PeftModel:
    if run.config is None:
        if root is None or run.name not in root.peft_config:
            known = [] if root is None else sorted(root.peft_config)
            raise StateError(
                f"run {run.name!r} has no config, and the model has no adapter of this name (it "
                f"has {known or 'none'}); give Run({run.name!r}, LoraConfig(r=8))"
            )
        return root
    if root is None:
        return get_peft_model(inner, run.config, run.name)
    root.add_adapter(run.name, run.config)
    return root
