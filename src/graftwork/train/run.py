"""One training from its recipe to the finished folder."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import GraftworkError
from . import base, bundle, loop, plan
from .bundle import Note, Place
from .prepare import Prepared, output_of, prepare, settle
from .recipe import Recipe, RecipeError, build


class Screen(Protocol):
    """Where a training tells what it does."""

    def say(self, text: str) -> None:
        """One line on what is being done now."""

    def plan(self, prepared: Prepared) -> None:
        """What is going to happen."""

    def start(self, steps: int, samples: int) -> None:
        """Training begins: so many steps, with so many samples in each."""

    def step(self, number: int, loss: float | None) -> None:
        """A step is done."""

    def stopping(self) -> None:
        """A stop was asked for."""

    def end(self) -> None:
        """Training is over."""


class StoppedError(GraftworkError, RuntimeError):
    """Training was stopped by the user; a checkpoint is there."""


@dataclass(frozen=True)
class Result:
    """What a training gave.

    Args:
        prepared: what went into it.
        before: metrics of the untrained adapter on the held-out data.
        after: metrics of the trained one.
        seconds: how long the training loop took.
        peak: the most memory that the process held, in bytes.
        size: bytes of the adapter's file.
    """

    prepared: Prepared
    before: dict[str, float]
    after: dict[str, float]
    seconds: float
    peak: int
    size: int

    @property
    def output(self) -> Path:
        """The folder that was written."""
        return Path(str(self.prepared.recipe.output))

    def next_command(self) -> str:
        """What to type next."""
        folder, corpus = shlex.quote(near(self.output)), self.prepared.corpus
        if corpus.task.model_class == "AutoModelForCausalLM":
            return f'{program()} generate {folder} "your prompt"'
        if "pair" in corpus.columns.of:
            return f"{program()} eval {folder}"
        return f'{program()} predict {folder} "some text"'


def program() -> str:
    """The command as one would type it here: ``graft``, or with the folder that it lies in."""
    run = Path(sys.argv[0])
    if run.name == "__main__.py":
        return "python -m graftwork"
    if run.stem != "graft" or shutil.which("graft") == str(run):
        return "graft"
    return shlex.quote(near(Path(os.path.abspath(run))))


def near(path: Path) -> str:
    """A path as one would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def resumed(settings: Mapping[str, Any]) -> Recipe:
    """The recipe of an unfinished training; what else was given must agree with it.

    Args:
        settings: what the user gave now, by key; ``output``, or the data it is named after.

    Raises:
        RecipeError: there is none, or something differs.
    """
    if not {"output", "data"} & settings.keys():
        raise RecipeError("--resume needs --output, the folder that was to be written")
    method = str(settings.get("method", "LORA"))
    begun = Place(output_of(settings.get("output"), str(settings.get("data")), method)).begun()
    recipe, _ = build(begun)
    now = settle(build({**begun, **settings})[0]).explicit
    then = recipe.explicit
    if other := [k for k in now if now[k] != then.get(k)]:
        lines = ", ".join(f"{k} was {then.get(k)!r} and is now {now[k]!r}" for k in other)
        raise RecipeError(
            f"--resume goes on with the same recipe, but {lines}. Leave that out, or start again "
            "with --overwrite"
        )
    return recipe


def train(recipe: Recipe, screen: Screen, resume: bool = False) -> Result:
    """Train, and write the folder.

    Args:
        recipe: what to train.
        screen: told what happens.
        resume: go on from the last checkpoint.

    Raises:
        RecipeError: something in the recipe, the data or the folders does not fit.
        TrainingError: the loss is no number.
        StoppedError: the user stopped it; it can be resumed.
    """
    recipe = settle(recipe)
    place = Place(str(recipe.output))
    if not resume:
        place.check_free(recipe.overwrite)
    prepared = prepare(recipe, screen.say)
    screen.plan(prepared)
    checkpoint = loop.last_checkpoint(place.work) if resume else None
    if not resume:
        place.begin(recipe)
    try:
        return _trained(prepared, screen, place, checkpoint)
    except BaseException:
        place.abandon()
        raise


def _trained(prepared: Prepared, screen: Screen, place: Place, checkpoint: Path | None) -> Result:
    recipe, made = prepared.recipe, prepared.plan
    pad = prepared.tokenizer.pad_token_id
    settings = loop.Settings(
        made.steps, made.rate, made.head_rate or made.rate, prepared.precision, place.work
    )
    samples, ways = prepared.train.samples, prepared.ways
    training = loop.Loop(recipe, settings, prepared.model, samples, pad, ways)
    training.add_callback(loop.Meter(screen.step))
    screen.say("measuring before training")
    before = measured(prepared)
    stop = loop.Stop(screen.stopping)
    began = time.monotonic()
    try:
        if ways.prefix is not None:
            screen.say("running the frozen blocks")
            training.keep()
        screen.start(made.steps, recipe.batch_size * recipe.gradient_accumulation)
        complete = loop.run(training, stop, checkpoint)
    finally:
        training.close()
        screen.end()
    seconds = time.monotonic() - began
    if not complete:
        raise StoppedError(
            f"stopped after step {training.state.global_step} of {made.steps}; a checkpoint is in "
            f"{near(place.work)}. Go on with:\n"
            f"  {program()} train --resume --output {shlex.quote(near(place.output))}"
        )
    if unused := prepared.model.unused_sites():
        screen.say(f"{len(unused)} layers with adapters never ran, among them {unused[0]}")
    screen.say("measuring after training")
    after = measured(prepared)
    return _written(prepared, place, before, after, seconds)


def measured(prepared: Prepared) -> dict[str, float]:
    """The metrics of the model as it is, on the held-out samples."""
    model = prepared.model
    task, size = prepared.corpus.task, prepared.recipe.batch_size
    model.eval()
    fused = prepared.ways.computing(model)
    with base.autocast(prepared.precision, model.device), fused:
        return task.measure(model, prepared.test.samples, size, prepared.tokenizer.pad_token_id)


def _written(
    prepared: Prepared,
    place: Place,
    before: dict[str, float],
    after: dict[str, float],
    seconds: float,
) -> Result:
    made = place.work / bundle.DONE
    if made.exists():  # of a run that was killed here
        shutil.rmtree(made)
    prepared.model.save_pretrained(made)
    prepared.tokenizer.save_pretrained(made)
    size = (made / "adapter_model.safetensors").stat().st_size
    result = Result(prepared, before, after, seconds, plan.peak(), size)
    metrics = {"before": before, "after": after, "held_out": prepared.corpus.held}
    recipe = prepared.recipe
    bundle.write(made, Note(recipe, prepared.spec, recipe.model, prepared.precision, metrics))
    place.finish(made)
    return result
