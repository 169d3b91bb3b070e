"""The plan that is shown before training: what is trained, how many steps, how much memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import base
from .recipe import Recipe
from .samples import Samples, collate

ADAM = 8  # bytes of state per trained number


@dataclass(frozen=True)
class Memory:
    """An estimate of what training takes on top of Python and its libraries, in bytes.

    Args:
        weights: the base model.
        adapter: the trained tensors with their gradients and the optimizer's state.
        activations: what the largest batch keeps for the backward pass.
    """

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations


@dataclass(frozen=True)
class Plan:
    """What is going to happen.

    Args:
        trainable: numbers that are trained.
        parameters: all numbers.
        places: how many layers are adapted; 1 of a prompt at the input.
        steps: optimizer steps.
        epochs: passes over the data.
        rate: peak learning rate of the adapter.
        head_rate: that of new modules; None where there are none.
        memory: the estimate.
        available: bytes that the device has free.
        virtual: virtual tokens of a prompt.
    """

    trainable: int
    parameters: int
    places: int
    steps: int
    epochs: float
    rate: float
    head_rate: float | None
    memory: Memory
    available: int
    virtual: int = 0

    @property
    def share(self) -> float:
        """The trained share of all parameters."""
        return self.trainable / self.parameters


def count_steps(recipe: Recipe, samples: int) -> tuple[int, float]:
    """Optimizer steps and epochs, from whichever the recipe gives; one epoch by default."""
    one = math.ceil(math.ceil(samples / recipe.batch_size) / recipe.gradient_accumulation)
    if recipe.steps is not None:
        return recipe.steps, recipe.steps / one
    epochs = recipe.epochs or 1.0
    return max(1, math.ceil(epochs * one)), epochs


def estimate(
    model: nn.Module, samples: Samples, recipe: Recipe, pad: int, precision: str, more: int = 0
) -> Memory:
    """What training will take, measured on two short samples and scaled to the longest batch.

    Args:
        model: with the adapter in it.
        samples: those to train on.
        recipe: decides the size of a batch.
        pad: the padding token.
        precision: in which it computes.
        more: virtual tokens that make every sample longer.
    """
    weights, trained = 0, 0
    for p in {id(p): p for p in model.parameters()}.values():
        size = p.numel() * p.element_size()
        weights += size
        trained += size + p.numel() * ADAM if p.requires_grad else 0
    lengths = sorted(samples.lengths(), reverse=True)[: recipe.batch_size]
    longest = max(range(len(samples)), key=samples.lengths().__getitem__)
    batch = collate([samples[longest]], pad)
    a, b = _growth(model, batch, precision, more)
    size, width = len(lengths), lengths[0] + more
    return Memory(weights, trained, int(size * (a * width + b * width**2)))


def _growth(
    model: nn.Module, batch: dict[str, Tensor], precision: str, more: int
) -> tuple[float, float]:
    """Bytes that a sample of n tokens keeps for the backward pass, as a n + b n^2; of these n
    ``more`` are virtual.
    """
    longest = batch["input_ids"].shape[1]
    long = min(longest, 64)
    short = max(1, long // 2)
    was = model.training
    model.train()
    with torch.random.fork_rng():
        few, many = (_kept(model, _cut(batch, n), precision) for n in (short, long))
    model.train(was)
    short, long = short + more, long + more
    if long == short:
        return many / long, 0.0
    b = max(0.0, (many / long - few / short) / (long - short))
    return many / long - b * long, b


def _cut(batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    # its end: T5 and BART look for the mark that ends a text
    return {key: t[:, -n:] if t.ndim > 1 else t for key, t in batch.items()}


def _kept(model: Any, batch: dict[str, Tensor], precision: str) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in model.buffers()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = model.device
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        base.autocast(precision, device),
    ):
        loss = model(**{key: t.to(device) for key, t in batch.items()}).loss
    del loss
    return sum(seen.values())


def available(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def peak() -> int:
    """The most memory in bytes that this process has held so far, on its accelerator if any."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import sys

    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
