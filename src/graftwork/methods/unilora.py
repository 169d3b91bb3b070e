"""Uni-LoRA (arXiv 2506.00799): W + B A, all entries of all A and B taken from one vector theta:
theta_i / sqrt(n_i) at the n_i places that are drawn for i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import LowRank, Shared, Site
from ..fields import positive, probability, whole


@dataclass
class UniLoraConfig(TargetConfig, method="UNILORA", peft="fan bias save layers"):
    """One trained vector for the whole model."""

    r: int = whole(4)  # rank
    proj_seed: int = 42  # seed of the places
    theta_d_length: int = whole(256)  # length of theta
    unilora_dropout: float = probability(0.0)  # probability, on the input, in training
    init_theta_d_bound: float = positive(0.02)  # theta starts within it; not the base
    init_weights: bool = True  # False: theta starts normal
    save_indices: bool = False  # False: a reader draws the places again, at the same layers

    def share(self, sites: Sequence[Site]) -> Shared:
        return Theta(self, sites)


def drawn(seed: int, length: int, count: int) -> Tensor:
    """``count`` indices below ``length``, each equally often, in a random order; as PEFT's."""
    import numpy as np

    rng = np.random.default_rng(seed)
    even = np.repeat(np.arange(length), count // length)
    rest = rng.choice(length, size=count % length, replace=False) if count % length else even[:0]
    every = np.concatenate([even, rest])
    rng.shuffle(every)
    return torch.as_tensor(every, dtype=torch.int64, device="cpu")


class Theta(Shared):
    """theta (length,); and, until the layers take them, their places in it and the scales there."""

    keys = {"theta": "unilora_theta_d"}

    def __init__(self, config: UniLoraConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(config.theta_d_length))
        self.bound = config.init_theta_d_bound if config.init_weights else None
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for site in sites:
            (out, in_), r = site.shape, config.at(site.path, site.parameter).r
            shapes[site.name] = [(*site.lead, r, in_), (*site.lead, out, r)]
        sizes = [math.prod(shape) for both in shapes.values() for shape in both]
        every = drawn(config.proj_seed, config.theta_d_length, sum(sizes))
        scale, here = every.bincount().clamp(min=1).float().rsqrt(), torch.get_default_device()
        scale, pieces = scale.to(here), iter(torch.split(every.to(here), sizes))
        self.places = {
            name: [(at := next(pieces).reshape(shape).clone(), scale[at]) for shape in both]
            for name, both in shapes.items()
        }

    def start(self) -> None:
        bound, theta = self.bound, self.theta
        theta.normal_() if bound is None else theta.uniform_(-bound, bound)


class UniLoRA(LowRank, config=UniLoraConfig):
    """Where A (..., r, in) and B (..., out, r) are in theta, and 1 / sqrt(n) there."""

    keys = {
        "places_A": "unilora_indices_A", "scale_A": "unilora_scales_A",
        "places_B": "unilora_indices_B", "scale_B": "unilora_scales_B",
    }  # fmt: skip
    stacked = True
    places_A: Tensor  # noqa: N815 - PEFT's name for the factor
    places_B: Tensor  # noqa: N815
    scale_A: Tensor  # noqa: N815
    scale_B: Tensor  # noqa: N815

    def __init__(self, config: UniLoraConfig, site: Site, shared: Theta) -> None:
        super().__init__(config, site, shared)
        for name, (places, scale) in zip("AB", shared.places.pop(site.name), strict=True):
            self.register_buffer(f"places_{name}", places, persistent=config.save_indices)
            self.register_buffer(f"scale_{name}", scale, persistent=config.save_indices)
        self.r, self.dropout = config.r, nn.Dropout(config.unilora_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        theta = self.shared.theta
        return theta[self.places_A] * self.scale_A, theta[self.places_B] * self.scale_B
