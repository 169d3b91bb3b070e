"""PEFT's ``peft.utils.merge_utils``: rules on stacked tensors, one for each adapter.

TIES (arXiv 2306.01708): the sign of the larger mass wins, and those that agree are averaged. DARE
(arXiv 2311.03099): numbers are dropped at random, the others made larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Weights (n,) as (n, 1, ...) of as many axes as the tensors."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.ndim - weights.ndim))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The share ``density`` of the largest numbers, zero elsewhere."""
    flat = tensor.flatten()
    top = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, top, flat[top]).reshape(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Each number with probability ``density``; ``rescale``: divided by it."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """Pruning by "magnitude" or at "random"; all that there is at a density of one or more.

    Raises:
        ValueError: a negative density, or another method.
    """
    if density >= 1:
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method}")


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Where each of the stacked tensors has the sign that wins, by mass or by "frequency".

    Raises:
        RuntimeError: another method.
    """
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    sign = tensor.sign()
    votes = tensor.sum(0) if method == "total" else sign.sum(0)
    return sign == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean of the stacked tensors where the mask holds."""
    count = majority_sign_mask.sum(0).clamp(min=1)
    return (task_tensors * majority_sign_mask).sum(0) / count


def _weighted(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    stacked = torch.stack(list(task_tensors))
    return stacked * reshape_weight_task_tensors(stacked, weights)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    return _weighted(task_tensors, weights).sum(0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the largest numbers."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """TIES on the largest numbers."""
    return _elected([prune(t, density, "magnitude") for t in task_tensors], weights,
                    majority_sign_method)  # fmt: skip


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of numbers drawn at random."""
    drawn = [prune(t, density, "random", rescale=True) for t in task_tensors]
    return task_arithmetic(drawn, weights)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """TIES on numbers drawn at random."""
    drawn = [prune(t, density, "random", rescale=True) for t in task_tensors]
    return _elected(drawn, weights, majority_sign_method)


def _elected(task_tensors: list[Tensor], weights: Tensor, method: str) -> Tensor:
    agrees = calculate_majority_sign_mask(torch.stack(task_tensors), method)
    return disjoint_merge(_weighted(task_tensors, weights), agrees)
