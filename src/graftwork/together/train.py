"""``train_together``: several adapters learn in one pass over one base model.

All their rows go through the base in one batch, as in mLoRA (arXiv 2312.02515); the adapters are
disjoint, so the gradient of the sum of the runs' losses is that of each run's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..engine.inject import switch_of
from ..model.functional import user_model
from .attach import attach, check, detach
from .loop import Options, Together
from .runs import Run, RunResults

Function = Callable[[Any, Any], Any]  # of a run's outputs and its batch


def train_together(
    model: nn.Module, runs: Sequence[Run], data: Any = None, *, loss: Function | None = None,
    evaluate: Any = None, evaluate_every: int | None = None, metric: Function | None = None,
    greater_is_better: bool = False, rows_at_once: int | None = None,
    padding: Mapping[str, float] | None = None, base_dropout: bool = False,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> RunResults:  # fmt: skip
    """Train several adapters over one base in one pass; each ends as it would alone.

    Args:
        model: a plain model, or one with adapters; the new ones are put into it, in place.
        runs: what to train.
        data: batches, dictionaries of the model's arguments: a list, a DataLoader, or a function
            from a ``Run`` to one, called for each pass. Runs that read one list or loader get the
            same batches.
        loss: from the outputs and the batch of one run to one number; None: the model's own, where
            it follows from ``logits`` and ``labels``.
        evaluate: held-out batches, as ``data``; or a function ``(model, name) -> number``, called
            with the adapter active.
        evaluate_every: optimizer steps between two evaluations; None: after the last one only.
        metric: a function like ``loss``, for evaluations.
        greater_is_better: whether a greater value is a better one.
        rows_at_once: rows of a pass at most, to bound the memory; a run's batch stays whole.
        padding: argument -> what fills up its shorter sequences, beside those of transformers.
        base_dropout: let the base drop as its config says, drawn for all runs at once.
        on_step: called after each step with its number and the runs' losses.

    Returns:
        What came of each run, by name, and the model. A run whose loss is no number has failed, and
        the others have gone on.

    Raises:
        ValueError: runs do not fit together, or have no data.
        TrainingError: a method cannot be trained beside others, or the loss is not known.
        StateError: the adapters cannot be in one batch of this model.
    """
    runs = list(runs)
    check(runs)
    options = Options(
        data, loss, evaluate, evaluate_every, metric, greater_is_better, rows_at_once, padding,
        base_dropout, on_step,
    )  # fmt: skip
    options.check(runs)
    return _trained(model, runs, options)


def _trained(model: nn.Module, runs: list[Run], options: Options) -> RunResults:
    fresh = switch_of(user_model(model)) is None
    whole, streams = attach(model, runs)
    flags = [(p, p.requires_grad) for p in whole.parameters()]
    together: Together | None = None
    try:
        together = Together(whole, runs, streams, options)
        results = together.train()
    except BaseException:
        if together is None or together.step == 0:  # nothing was trained: leave no trace
            detach(whole, [run.name for run in runs if run.config is not None], fresh)
        raise
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return RunResults(whole, results, options.greater_is_better)
