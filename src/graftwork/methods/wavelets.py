"""Orthogonal wavelets: their filters, and the inverse of one level of their transform."""

from __future__ import annotations

import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = {"db": range(1, 39), "sym": range(2, 21), "coif": range(1, 18)}
FAMILIES = [f"{name}{n}" for name, orders in ORDERS.items() for n in orders]


def filters(family: str) -> Tensor:
    """The low and the high pass of the inverse transform, (2, taps).

    Raises:
        ValueError: the numbers of that family are PyWavelets', which is not installed.
    """
    if family == "db1":
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    try:
        wavelet = importlib.import_module("pywt").Wavelet(family)
    except ModuleNotFoundError:
        raise ValueError(
            f"wavelet_family={family!r} needs PyWavelets: pip install PyWavelets; 'db1' does not"
        ) from None
    return torch.tensor([wavelet.rec_lo, wavelet.rec_hi])


def inverse(s: Tensor, f: Tensor) -> Tensor:
    """Along the last axis of a matrix: [low, high] (..., m) -> signal (..., m + 2 - taps)."""
    low_high, cut = torch.unflatten(s, -1, (2, -1)), f.shape[1] - 2
    return F.conv_transpose1d(low_high, f[:, None], stride=2, padding=cut).squeeze(1)
