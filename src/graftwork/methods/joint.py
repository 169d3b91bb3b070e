"""The bases of FRoD: one for the layers that play the same part in their blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import Shared, Site
from ..inits.drawn import generator

if TYPE_CHECKING:
    from .frod import FrodConfig


class Bases(Shared):
    """For each category V (in, in) and the places of S, (2, entries); for each layer U and l0."""

    def __init__(self, config: FrodConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.keys: dict[str, str] = {}
        self.layers: dict[str, list[str]] = {}  # the names of each category
        members: dict[str, dict[int, Site]] = {}
        for i, site in enumerate(sites):
            self.layers.setdefault(category(site.name), []).append(site.name)
            members.setdefault(category(site.name), {})[block(site.name, i)] = site
        drawn = generator(config.projection_prng_key)
        for name in sorted(members):
            mine = [site for _, site in sorted(members[name].items())]
            self.add(config, name, mine, drawn)
        for site in sites:
            v = self.of("V", category(site.name)).double()
            self.place(site.name, against(v, site.weight.to(v)))

    def add(self, config: FrodConfig, name: str, sites: list[Site], drawn: torch.Generator) -> None:
        """The basis of one category."""
        if len({site.shape[1] for site in sites}) > 1:
            sizes = ", ".join(f"{site.name} {site.describe()}" for site in sites)
            raise ValueError(
                f"FRoD's layers called {name} share a basis, so they need equally many inputs, "
                f"unlike {sizes}; leave some of them out, or give them another adapter"
            )
        n = sites[0].shape[1]
        weights = [w for s in sites for w in s.weight.float().reshape(-1, *s.shape)]
        v = joint_basis(weights, config.regularization_alpha)
        count = min(int(n * n * config.sparse_rate), n * n - n)
        count = max(count, 1) if config.sparse_rate and n > 1 else count
        place = torch.randperm(n * n - n, generator=drawn, device="cpu")[:count].to(v.device)
        place = place + place // n + 1  # in (n, n), leaving out the diagonal
        where, size = torch.stack([place // n, place % n]), torch.tensor([n, n])
        for key, tensor in {"V": v, "s_indices": where, "s_size": size}.items():
            self.register_buffer(f"{key}:{name}", tensor, persistent=config.save_projection)
            self.keys[f"{key}:{name}"] = f"frod_{key}.{name}"

    def of(self, key: str, name: str) -> Tensor:
        """V, s_indices or s_size of a category; U or l0 of a layer."""
        return self._buffers[f"{key}:{name.replace('.', '/')}"]  # type: ignore[return-value]

    def place(self, name: str, b: Tensor) -> None:
        """Take B = W V'^-1 of a layer apart: U diag(l0)."""
        length: Tensor = torch.linalg.vector_norm(b, dim=-2)
        u = b / torch.where(length > 1e-12, length, torch.inf)[..., None, :]
        for key, tensor in {"U": u, "l0": length}.items():
            leaf = f"{key}:{name.replace('.', '/')}"
            self.register_buffer(leaf, tensor.float(), persistent=False)

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        """A file's V need not be what is found here: B is brought from one basis to the other."""
        old = {name: self.of("V", name).double().clone() for name in self.layers}
        super().take(tensors, config)
        for name, v in old.items():
            new = self.of("V", name).double()
            for layer in () if torch.equal(new, v) else self.layers[name]:
                b = self.of("U", layer).double() * self.of("l0", layer).double()[..., None, :]
                self.place(layer, against(new, b @ v.mT))


def joint_basis(weights: list[Tensor], ridge: float) -> Tensor:
    """V of the hierarchical joint decomposition: from [W1; W2; ...] = [Q1; Q2; ...] R it is R' E
    with the eigenvectors E of the mean of (Qi' Qi + ridge I)^-1; orthogonal where there are fewer
    rows than columns."""
    stacked = torch.cat(weights)  # on the CPU, as in PEFT: elsewhere V would be another one
    stacked = stacked if stacked.is_meta else stacked.cpu()
    if stacked.shape[0] < stacked.shape[1]:
        v: Tensor = torch.linalg.svd(stacked, full_matrices=True).Vh.mT
        return v.to(weights[0].device)
    q, r = torch.linalg.qr(stacked)
    grams = [p.mT @ p + ridge * torch.eye(len(r)).to(r) for p in q.split([*map(len, weights)])]
    mean = sum(map(torch.linalg.inv, grams)) / len(grams)
    v = r.mT @ torch.linalg.eigh(mean).eigenvectors
    return v.to(weights[0])


def against(v: Tensor, w: Tensor) -> Tensor:
    """W V'^-1."""
    try:
        b: Tensor = torch.linalg.solve(v, w.mT)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # inputs that no layer reads
        b = torch.linalg.pinv(v, rtol=1e-6) @ w.mT
    return b.mT


def category(path: str) -> str:
    """The last two names of a path, after a block's number only the last: ``self_attn_q_proj``."""
    *front, last = path.split(".")
    if not front or front[-1].isdigit():
        return last
    if front[-2:] == ["attention", "output"] and last == "dense":
        return "attention_output"  # BERT's, which is no mlp's
    return f"{front[-1]}_{last}"


def block(path: str, fallback: int) -> int:
    """The number of a layer's block."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in [*after, *parts] if part.isdigit()), fallback)
