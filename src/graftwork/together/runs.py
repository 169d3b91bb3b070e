"""What is trained together, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from ..config import PeftConfig, TargetConfig
from ..errors import TrainingError, did_you_mean
from ..targets.names import check_name

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"


def _linear(progress: float) -> float:
    return 1 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


@dataclass(frozen=True)
class EarlyStop:
    """When a run ends before its steps are done; it then has the state of its best evaluation.

    Args:
        patience: evaluations in a row that are no better than the best one.
        min_delta: by how much a value must be better to count.

    Raises:
        ValueError: a number is out of range.
    """

    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0:
            raise ValueError(
                f"EarlyStop(patience={self.patience}, min_delta={self.min_delta}): patience is 1 "
                "or more, min_delta 0 or more"
            )


@dataclass(frozen=True)
class Run:
    """One training among several: an adapter and how it learns.

    Args:
        name: the adapter's name in the model.
        config: its method; None: the model has an adapter of this name, which is trained on.
        learning_rate: peak rate.
        seed: decides its start and its dropout, as ``torch.manual_seed(seed)`` before
            ``get_peft_model`` would.
        steps: optimizer steps; None: once through the data.
        schedule: "constant", "linear" or "cosine" (to zero at the last step), or a function from
            the step (0-based) to a factor of the rate.
        warmup: share of the steps in which the rate rises to its peak, 0 to 1.
        weight_decay: AdamW's.
        max_grad_norm: this run's gradients are clipped to this norm; None: not at all.
        head_learning_rate: peak rate of modules that train as a whole, such as a new head; None:
            ``learning_rate``.
        accumulation: batches in one step, whose losses are averaged.
        optimizer: a function from parameter groups (dictionaries with "params", "lr" and
            "weight_decay") to a torch optimizer; None: AdamW.
        stop: when to end before that; needs something to evaluate.
        data: this run's own batches; None: those of ``train_together``.
        evaluate: this run's own evaluation; None: that of ``train_together``.

    Raises:
        ValueError: a value is out of range.
        TypeError: the config is none of a method's own.
    """

    name: str
    config: PeftConfig | None = None
    _: KW_ONLY
    learning_rate: float = 1e-3
    seed: int = 0
    steps: int | None = None
    schedule: str | Callable[[int], float] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    head_learning_rate: float | None = None
    accumulation: int = 1
    optimizer: Callable[[list[dict[str, Any]]], Any] | None = None
    stop: EarlyStop | None = None
    data: Any = None
    evaluate: Any = None

    def __post_init__(self) -> None:
        check_name(self.name, ())
        if self.config is not None and not isinstance(self.config, TargetConfig):
            raise TypeError(
                f"run {self.name!r}: config is a {type(self.config).__name__}; give a method's "
                "own, such as LoraConfig(r=8), or None for an adapter that the model has"
            )
        for name in ("learning_rate", "head_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"run {self.name!r}: {name}={value}; it must be above 0")
        for name in ("steps", "accumulation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run {self.name!r}: {name}={value}; it must be 1 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"run {self.name!r}: warmup={self.warmup} is a share of the steps, from 0 to "
                "below 1"
            )
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"run {self.name!r}: schedule={self.schedule!r} is not known"
                f"{did_you_mean(self.schedule, SCHEDULES)}; it is one of {list(SCHEDULES)}, or a "
                "function from the step to a factor"
            )

    def factor(self, step: int, steps: int) -> float:
        """By what the peak rate is multiplied in a step (0-based) of so many."""
        if callable(self.schedule):
            return self.schedule(step)
        rising = round(self.warmup * steps)
        if step < rising:
            return step / rising
        return SCHEDULES[self.schedule]((step - rising) / max(1, steps - rising))


@dataclass
class RunResult:
    """What came of one run.

    Args:
        run: what was asked for.
        losses: the loss of each step, methods' penalties included.
        evaluations: (step, value) of each evaluation.
        best: the best of them; with ``stop`` the adapter is as it was then.
        ended: "finished", "stopped early" or "failed".
        error: why it failed.
    """

    run: Run
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    ended: str = ""
    error: str | None = None

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def steps(self) -> int:
        """How many optimizer steps were done."""
        return len(self.losses)

    def cells(self) -> tuple[str, ...]:
        """The line of a table."""
        run = self.run
        best = "-" if self.best is None else f"{self.best[1]:.4g} at {self.best[0]}"
        return (
            run.name,
            "-" if run.config is None else run.config.method,
            f"{run.learning_rate:g}",
            str(run.seed),
            str(self.steps),
            f"{self.losses[0]:.4g} to {self.losses[-1]:.4g}" if self.losses else "-",
            best,
            self.ended + (f": {self.error}" if self.error else ""),
        )


HEAD = ("run", "method", "rate", "seed", "steps", "loss", "best", "ended")


@dataclass(repr=False)
class RunResults(Mapping[str, RunResult]):
    """What came of all runs, by name; printing gives a table.

    Args:
        model: the model with all the runs' adapters in it, a ``PeftModel``.
        runs: the results.
        greater_is_better: how evaluations compare.
    """

    model: Any
    runs: dict[str, RunResult]
    greater_is_better: bool = False

    def __getitem__(self, name: str) -> RunResult:
        return self.runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def best(self) -> RunResult:
        """The run with the best evaluation.

        Raises:
            TrainingError: no run was evaluated.
        """
        known = [r for r in self.runs.values() if r.best is not None]
        if not known:
            raise TrainingError("no run was evaluated; give train_together(evaluate=batches)")
        sign = -1 if self.greater_is_better else 1
        return min(known, key=lambda r: sign * r.best[1] if r.best else math.inf)

    def __str__(self) -> str:
        lines = [HEAD, *(result.cells() for result in self.runs.values())]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    __repr__ = __str__
