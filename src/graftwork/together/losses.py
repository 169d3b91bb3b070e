"""The loss of each run in a pass: a function of the user's, or the model's own, computed from what
the model puts out.

A model's own loss is one number for all rows of a batch, so it is computed here instead, for each
run over its own rows. Which of the formulas is the model's is not guessed from its name: each that
fits is compared with the loss that the model itself gives for a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TrainingError
from .batches import LABELS, Joined

IGNORED = -100
Terms = tuple[Tensor, Tensor]  # the loss of each element (rows, ...), and which of them count


def _tokens(logits: Tensor, targets: Tensor) -> Terms:
    """Cross-entropy of (rows, t, classes) and (rows, t)."""
    flat = logits.flatten(0, -2).float()
    targets = targets.long()
    loss = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return loss.view_as(targets), targets != IGNORED


def next_token(logits: Tensor, labels: Tensor) -> Terms | None:
    """Of causal language models: each token from those before it; virtual tokens are no labels."""
    if logits.ndim != 3 or labels.ndim != 2 or logits.shape[1] < labels.shape[1]:
        return None
    front = logits.shape[1] - labels.shape[1]
    return _tokens(logits, F.pad(labels, (front, 1), value=IGNORED)[:, 1:])


def each_token(logits: Tensor, labels: Tensor) -> Terms | None:
    """Of taggers, masked language models and decoders that are given the tokens before."""
    if logits.ndim != 3 or labels.ndim != 2 or logits.shape[1] < labels.shape[1]:
        return None
    front = logits.shape[1] - labels.shape[1]
    return _tokens(logits, F.pad(labels, (front, 0), value=IGNORED))


def one_class(logits: Tensor, labels: Tensor) -> Terms | None:
    """Of classifiers."""
    labels = labels.flatten()
    if logits.ndim != 2 or len(labels) != len(logits) or labels.is_floating_point():
        return None
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none")
    return loss[:, None], (labels != IGNORED)[:, None]


def several_classes(logits: Tensor, labels: Tensor) -> Terms | None:
    """Of classifiers whose rows may have several labels, (rows, classes) of 0 and 1."""
    if logits.shape != labels.shape or not labels.is_floating_point():
        return None
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return loss, torch.ones_like(labels, dtype=torch.bool)


def squares(logits: Tensor, labels: Tensor) -> Terms | None:
    """Of regressions."""
    if logits.numel() != labels.numel() or not labels.is_floating_point():
        return None
    error = (logits - labels.reshape(logits.shape)).square()
    return error, torch.ones_like(error, dtype=torch.bool)


OWN: tuple[Callable[[Tensor, Tensor], Terms | None], ...] = (
    next_token,
    each_token,
    one_class,
    several_classes,
    squares,
)


def answer_span(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Of extractive question answering: the mean over where the answer starts and where it ends."""
    ends = []
    for name in ("start", "end"):
        logits = outputs[f"{name}_logits"]
        places = batch[f"{name}_positions"].reshape(-1).clamp(0, logits.shape[1])
        ends.append(F.cross_entropy(logits, places, ignore_index=logits.shape[1]))
    return (ends[0] + ends[1]) / 2


class Given:
    """A function of the outputs and the batch of one run.

    Args:
        function: gives a tensor with one number.
    """

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function

    def __call__(self, outputs: Any, joined: Joined) -> Tensor:
        """The loss of each item, (items,)."""
        found = []
        for item, own in zip(joined.items, joined.apart(outputs), strict=True):
            value = self.function(own, item.batch)
            if not isinstance(value, Tensor):
                value = torch.tensor(float(value))
            if value.numel() != 1:
                raise TrainingError(
                    f"the loss of run {item.name!r} has the shape {tuple(value.shape)}; return one "
                    "number, such as its mean"
                )
            found.append(value.reshape(()).float())
        return torch.stack(found)


class Own:
    """One of the formulas in OWN, for all items at once."""

    def __init__(self, terms: Callable[[Tensor, Tensor], Terms | None]) -> None:
        self.terms = terms

    def __call__(self, outputs: Any, joined: Joined) -> Tensor:
        """The loss of each item, (items,)."""
        logits = outputs["logits"]
        labels: list[Tensor] = []
        for item in joined.items:
            if not isinstance(own := item.batch.get("labels"), Tensor):
                raise TrainingError(
                    f"a batch of run {item.name!r} has no labels for the loss; give each batch "
                    '"labels"'
                )
            labels.append(own)
        if self.terms is next_token and joined.most:
            # what stands before the first token of a row without virtual ones predicts nothing
            labels = [
                own if item.virtual else F.pad(own[:, 1:], (1, 0), value=IGNORED)
                for item, own in zip(joined.items, labels, strict=True)
            ]
        longest = max(own.shape[1] if own.ndim > 1 else 0 for own in labels)
        if self.terms in (next_token, each_token):
            labels = [F.pad(own, (0, longest - own.shape[1]), value=IGNORED) for own in labels]
        found = self.terms(logits, torch.cat(labels).to(logits.device))
        if found is None:
            raise TrainingError(
                f"labels of the shape {[tuple(own.shape) for own in labels]} do not fit logits of "
                f"{tuple(logits.shape)}"
            )
        loss, counted = found
        where = torch.arange(len(joined.sizes), device=loss.device)
        owner = torch.repeat_interleave(
            where, torch.tensor(joined.sizes, device=loss.device), output_size=len(loss)
        )
        zeros = loss.new_zeros(len(joined.sizes))
        sums = zeros.index_add(0, owner, loss.flatten(1).sum(1).to(zeros))
        return sums / zeros.index_add(0, owner, counted.flatten(1).sum(1).to(zeros))


def own_loss(outputs: Any, batch: Mapping[str, Any], model: str) -> Given | Own:
    """How a model computes its loss, found by its outputs for a batch with labels.

    Args:
        outputs: what the model gave for the batch, its loss among it.
        batch: the batch.
        model: the model's class, for the error.

    Raises:
        TrainingError: by none of the known formulas.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if loss is None:
        has = [name for name in LABELS if name in batch] or "no labels"
        raise TrainingError(
            f"{model} gives no loss for a batch with {has}; give "
            "train_together(loss=function), which gets the outputs and the batch of one run and "
            "returns its loss"
        )
    if "start_positions" in batch and "start_logits" in outputs:
        if _close(answer_span(outputs, batch), loss):
            return Given(answer_span)
    elif isinstance(batch.get("labels"), Tensor) and isinstance(outputs.get("logits"), Tensor):
        for terms in OWN:
            found = terms(outputs["logits"], batch["labels"])
            if found is not None and _close(found[0].sum() / found[1].sum(), loss):
                return Own(terms)
    raise TrainingError(
        f"the loss of {model} is none that can be computed for some of its rows from its logits; "
        "give train_together(loss=function), which gets the outputs and the batch of one run and "
        "returns its loss"
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float().to(a.device), rtol=1e-3, atol=1e-5, equal_nan=True)
