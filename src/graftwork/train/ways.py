"""How a training computes, chosen by trying the model on a few samples: its loss with whole logits
or without, its batches padded or packed, its frozen blocks anew or once.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..loss.fused import FusedLoss, fused_loss
from . import base, packing, prefix
from .prefix import Prefix
from .recipe import Recipe, RecipeError
from .samples import ByLength, Samples, collate
from .tasks import Task

NOT_ASKED = "nobody asked for it"
OFF = {"off": "the recipe says so"}


@dataclass(frozen=True)
class Ways:
    """What was chosen, and why not otherwise.

    Args:
        loss: what computes the loss.
        padded: why batches are padded; empty where they are packed.
        spared: the share of tokens that packing spares, or would.
        prefix: the frozen blocks whose states are kept; None where none are.
        language: whether the task has a loss for each token, so that there is a choice.
    """

    loss: FusedLoss
    padded: str
    spared: float = 0.0
    prefix: Prefix | None = None
    language: bool = True

    @property
    def packed(self) -> bool:
        """Whether a batch is one row without padding."""
        return not self.padded

    def computing(self, model: Any) -> AbstractContextManager[Any]:
        """A context for forwards of the model, with the loss as it was chosen."""
        return fused_loss(model, fallback=True) if self.loss else nullcontext()


PLAIN = Ways(FusedLoss(NOT_ASKED), NOT_ASKED)


def order_of(recipe: Recipe, samples: Samples) -> ByLength:
    """The order of the samples in each epoch."""
    together = recipe.batch_size * recipe.gradient_accumulation
    return ByLength(samples.lengths(), together, recipe.seed)


def choose(
    recipe: Recipe, task: Task, model: Any, samples: Samples, pad: int, precision: str,
    epochs: float,
) -> Ways:  # fmt: skip
    """How this training computes.

    Args:
        recipe: what the user wants.
        task: only language models have a loss for each token.
        model: with its adapters.
        samples: those to train on.
        pad: the padding token.
        precision: in which it computes.
        epochs: of the training.

    Raises:
        RecipeError: something that the recipe asks for cannot be done.
    """
    with base.autocast(precision, model.device):
        loss = _loss(recipe, task, model, samples, pad)
        padded, spared = _padded(recipe, task, model, samples, pad)
        kept = _prefix(recipe, model, samples, pad, epochs)
    return Ways(loss, padded, spared, kept, not _language(task))


def _language(task: Task) -> str:
    causal = task.model_class == "AutoModelForCausalLM"
    return "" if causal else f"the task {task.name} has no loss for each token"


def _several() -> str:
    one = torch.cuda.device_count() < 2 or torch.distributed.is_initialized()
    return "" if one else "one process computes on several GPUs; start it with torchrun"


@torch.no_grad()
def _loss(recipe: Recipe, task: Task, model: Any, samples: Samples, pad: int) -> FusedLoss:
    if reason := OFF.get(recipe.fused_loss, "") or _language(task) or _several():
        return FusedLoss(reason)
    few = [packing.short(samples[i]) for i in range(min(packing.TRIED, len(samples)))]
    batch = {key: tensor.to(model.device) for key, tensor in collate(few, pad).items()}
    training = model.training
    model.eval()
    try:
        with fused_loss(model, fallback=True) as how:
            found = float(model(**batch).loss)
        if how:
            want = float(model(**batch).loss)
            near = base.rounding(model)
            if not math.isclose(found, want, rel_tol=near, abs_tol=near):
                how.reason = f"its loss would be {found:.5g} where the model's own is {want:.5g}"
    finally:
        model.train(training)
    return how


def _padded(
    recipe: Recipe, task: Task, model: Any, samples: Samples, pad: int
) -> tuple[str, float]:
    if reason := OFF.get(recipe.packing, "") or _language(task) or _several():
        if recipe.packing == "on":
            raise RecipeError(f"--packing on: {reason}; leave it out")
        return reason, 0.0
    spared = packing.saved(samples, list(order_of(recipe, samples)), recipe.batch_size)
    if recipe.packing == "auto" and spared < packing.WORTH:
        return f"only {spared:.1%} of the tokens are padding", spared
    reason = packing.why_not(model, samples, pad)
    if reason and recipe.packing == "on":
        raise RecipeError(f"--packing on: {reason}; leave it out")
    return reason, spared


def _prefix(recipe: Recipe, model: Any, samples: Samples, pad: int, epochs: float) -> Prefix | None:
    if not recipe.cache_prefix:
        return None
    if epochs <= 1:
        raise RecipeError(
            f"--cache-prefix spares work from the second epoch on, and this training has "
            f"{epochs:.3g}; leave it out, or give more --epochs"
        )
    if reason := _several():
        raise RecipeError(f"--cache-prefix: {reason}")
    return prefix.find(model, samples, pad)


def told(ways: Ways) -> list[tuple[str, str]]:
    """The ways as names and texts, for the plan."""
    batches = f"packed, without padding ({ways.spared:.1%} of the tokens before)"
    if ways.padded:
        batches = f"padded: {ways.padded}"
    lines = [("loss", str(ways.loss)), ("batches", batches)] if ways.language else []
    if (kept := ways.prefix) is not None:
        lines.append(
            (
                "prefix",
                f"the first {kept.count} of {kept.every} blocks run once; "
                f"{kept.size / 1e6:,.1f} MB of their states are kept",
            )
        )
    return lines
