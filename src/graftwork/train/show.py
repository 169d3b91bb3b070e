"""What a training shows: the plan, a progress bar, and the result."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from . import corpus
from .plan import Plan
from .prepare import Prepared
from .run import Result, near
from .ways import told

SHARE = 0.1  # without a terminal, a line for each such share of the steps


def stderr() -> Console:
    """The console for messages."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=False)


def stdout() -> Console:
    """The console for results."""
    return Console(file=sys.stdout, highlight=False)


class Terminal:
    """Shows a training on a terminal; in a file, a line now and then.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.status: Any = None
        self.began, self.steps, self.samples, self.first = 0.0, 0, 0, 0

    def say(self, text: str) -> None:
        """What is being done now; gone when the next thing begins."""
        if not self.console.is_terminal:
            return
        if self.status is None:
            self.status = self.console.status(f"{text} ...")
            self.status.start()
        self.status.update(f"{text} ...")

    def quiet(self) -> None:
        """Take the last ``say`` away."""
        if self.status is not None:
            self.status.stop()
            self.status = None

    def plan(self, prepared: Prepared) -> None:
        """The plan, and remarks below it."""
        self.quiet()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, text in plan_lines(prepared):
            table.add_row(name, text)
        self.console.print(table)
        for remark in prepared.remarks:
            self.console.print(f"[yellow]note[/yellow]  {remark}")

    def start(self, steps: int, samples: int) -> None:
        """Show the bar."""
        self.quiet()
        self.steps, self.samples, self.first = steps, samples, 0
        self.began = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}  {task.fields[words]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.bar.add_task("", total=steps, words="")
            self.bar.start()

    def step(self, number: int, loss: float | None) -> None:
        """Move the bar."""
        self.first = self.first or number - 1
        words = self._words(number, loss)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=number, words=words)
            return
        every = max(1, math.ceil(self.steps * SHARE))
        if number % every == 0 or number == self.steps:
            self.console.print(f"step {number}/{self.steps}  {words}")

    def _words(self, number: int, loss: float | None) -> str:
        seconds = time.monotonic() - self.began
        done = max(1, number - self.first)
        left = seconds / done * (self.steps - number)
        told = f"loss {loss:.3f}  " if loss is not None else ""
        return (
            f"{told}{done * self.samples / max(seconds, 1e-9):,.0f} samples/s  {clock(left)} left"
        )

    def stopping(self) -> None:
        """Ctrl-C was pressed."""
        self.console.print("stopping after this step, with a checkpoint; Ctrl-C again breaks off")

    def end(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def close(self) -> None:
        """Leave the terminal clean, whatever happened."""
        self.end()
        self.quiet()


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def plan(self, prepared: Prepared) -> None:
        """Nothing."""

    def start(self, steps: int, samples: int) -> None:
        """Nothing."""

    def step(self, number: int, loss: float | None) -> None:
        """Nothing."""

    def stopping(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def plan_lines(prepared: Prepared) -> list[tuple[str, str]]:
    """The plan as names and texts."""
    recipe, found, made = prepared.recipe, prepared.corpus, prepared.plan
    spec, task = prepared.spec, prepared.corpus.task
    kind = type(prepared.model.get_base_model()).__name__
    goal = f"{task.name}: {task.about}"
    if spec.labels:
        goal = f"{task.name}, {len(spec.labels)} labels: {_list(spec.labels)}"
    heads = f", {made.head_rate:g} for the new head" if made.head_rate is not None else ""
    together = recipe.batch_size * recipe.gradient_accumulation
    epochs = f"{made.epochs:.3g} epoch{'s' * (made.epochs != 1)}"
    return [
        ("model", f"{model_name(recipe.model)}, {kind}"),
        ("data", f"{len(found.train):,} to train, {len(found.test):,} held out ({found.held})"),
        ("columns", str(found.columns)),
        ("task", goal),
        ("method", f"{_method(recipe.method, made)}{_options(recipe.method_options)}"),
        ("trains", f"{made.trainable:,} of {made.parameters:,} parameters ({made.share:.2%})"),
        ("steps", f"{made.steps:,} of {together} samples ({epochs}), {prepared.precision}"),
        ("length", f"at most {spec.max_length} tokens{_virtual(made.virtual)}"),
        ("rate", f"{made.rate:g}{heads}, {recipe.schedule}"),
        *told(prepared.ways),
        ("memory", memory(made)),
        ("output", near(Path(str(recipe.output)))),
    ]


def _method(name: str, made: Plan) -> str:
    if made.places == 1 and made.virtual:
        return f"{name} at the input"
    return f"{name} at {made.places} place{'s' * (made.places != 1)}"


def _virtual(count: int) -> str:
    return f" and {count} virtual one{'s' * (count != 1)}" if count else ""


def model_name(source: str) -> str:
    """A model's folder or hub id, short enough for a line."""
    path = Path(source)
    return path.parent.name if path.name == "model" else corpus.short(source)


def memory(made: Plan) -> str:
    """The memory estimate in words."""
    m = made.memory
    return (
        f"about {size(m.total)}: weights {size(m.weights)}, adapter and optimizer "
        f"{size(m.adapter)}, activations {size(m.activations)} (an estimate)"
    )


def _options(values: dict[str, Any]) -> str:
    return f" ({', '.join(f'{k}={v}' for k, v in values.items())})" if values else ""


def _list(words: Any) -> str:
    return ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return (
                f"{count:.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"
            )
        count /= 1000
    return f"{count:.1f} GB"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss``, or ``h:mm:ss``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def value(name: str, number: float) -> str:
    """A metric as it is shown."""
    return f"{number:.1%}" if name in ("accuracy", "macro_f1") else f"{number:.4g}"


def result(found: Result, console: Console) -> None:
    """The result: metrics before and after, what it took, where it is, what to type next."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("held-out data")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for name in found.after:
        table.add_row(name, value(name, found.before[name]), value(name, found.after[name]))
    console.print(table)
    made = found.prepared.plan
    console.print(
        f"\ntrained {made.trainable:,} parameters ({made.share:.2%}) in {clock(found.seconds)}, "
        f"peak memory {size(found.peak)}\nadapter {near(found.output)} ({size(found.size)})\n"
        f"next    {found.next_command()}",
        highlight=False,
        soft_wrap=True,
    )


def result_json(found: Result) -> dict[str, Any]:
    """The result as plain data."""
    prepared = found.prepared
    return {
        "output": str(found.output),
        "task": prepared.corpus.task.name,
        "metric": prepared.corpus.task.metric,
        "before": found.before,
        "after": found.after,
        "held_out": {"count": len(prepared.corpus.test), "source": prepared.corpus.held},
        "plan": plan_json(prepared),
        "seconds": round(found.seconds, 3),
        "peak_bytes": found.peak,
        "adapter_bytes": found.size,
        "remarks": prepared.remarks,
        "next": found.next_command(),
    }


def plan_json(prepared: Prepared) -> dict[str, Any]:
    """The plan as plain data."""
    made = prepared.plan
    return {
        "model": prepared.recipe.model,
        "method": prepared.recipe.method,
        "trainable": made.trainable,
        "parameters": made.parameters,
        "share": made.share,
        "layers": made.places,
        "steps": made.steps,
        "epochs": made.epochs,
        "learning_rate": made.rate,
        "head_learning_rate": made.head_rate,
        "precision": prepared.precision,
        "max_length": prepared.spec.max_length,
        "virtual_tokens": made.virtual,
        "memory_bytes": made.memory.total,
        **dict(told(prepared.ways)),
    }
