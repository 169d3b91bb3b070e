"""GLoRA (arXiv 2306.07967): W' = W + W * A + B and b' = b + b * D + E + W C; each of the five is a
product of two factors, one number an output (for C: an input), a single number, or left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TargetConfig
from ..engine import Adapter, Site
from ..errors import warn
from ..fields import choice, whole


@dataclass
class GloraConfig(TargetConfig, method="GLORA", peft="bias save"):
    """What each of the five terms is; those of the bias are left out where a layer has none."""

    r: int = whole(8)  # rank of the terms that are "lora"
    config_A_B: str = choice("lora", "vector", "constant", "none")  # noqa: N815 - PEFT's name; A, B
    config_C: str = choice("lora", "vector", "none")  # noqa: N815 - PEFT's name; C
    config_D_E: str = choice("constant", "vector", "none")  # noqa: N815 - PEFT's name; D, E
    init_weights: bool = True  # False: not the identity at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config_A_B == self.config_C == self.config_D_E == "none":
            raise ValueError('all terms are "none", so nothing trains; try config_A_B="lora"')

    def kinds(self, site: Site) -> dict[str, str]:
        """What each term is at a layer."""
        c, d = (self.config_C, self.config_D_E) if site.bias is not None else ("none", "none")
        if self.config_A_B == c == d == "none":
            warn(f"GLoRA does nothing at {site.name}, which has no bias; leave that layer out")
        return {**dict.fromkeys("AB", self.config_A_B), "C": c, **dict.fromkeys("DE", d)}


class GLoRA(Adapter, config=GloraConfig):
    """A and B (out, in), C (in, 1), D and E (out,), or what broadcasts to that; A = Ad Au, ..."""

    def __init__(self, config: GloraConfig, site: Site, shared: None = None) -> None:
        super().__init__(config, site)
        (out, in_), r = site.shape, config.r
        self.kinds, self.random = config.kinds(site), not config.init_weights
        self.zeros: dict[str, tuple[int, ...]] = {}  # PEFT saves zeros for a term that is left out
        self.keys = {}
        for term, columns in {"A": [in_], "B": [in_], "C": [1], "D": [], "E": []}.items():
            rows, kind = in_ if term == "C" else out, self.kinds[term]
            if kind == "none":
                self.zeros[f"glora_{term}.zeros"] = (rows, *columns)
            elif kind == "lora":
                self.add(f"{term}d", f"glora_{term}.Xd", rows, r)
                self.add(f"{term}u", f"glora_{term}.Xu", r, *columns)
            else:
                shape = (1,) if kind == "constant" else (rows, *(1 for _ in columns))
                self.add(term, f"glora_{term}.X", *shape)

    def add(self, name: str, key: str, *shape: int) -> None:
        """A new tensor, and its name in a file."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.keys[name] = key

    def start(self, site: Site) -> None:
        for name, p in self.named_parameters():
            if not (self.random or name.endswith("u")):
                p.zero_()
            elif self.kinds[name[0]] == "constant":
                p.normal_(std=0.02)
            else:
                nn.init.kaiming_uniform_(p if p.ndim > 1 else p[None], a=5**0.5)

    def term(self, name: str) -> Any:
        """One of the five; 0 where it is left out."""
        if self.kinds[name] == "lora":
            return getattr(self, f"{name}d") @ getattr(self, f"{name}u")
        return 0.0 if self.kinds[name] == "none" else getattr(self, name)

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, C, D, E = map(self.term, "ABCDE")
        if b is not None:
            b = b + b * D + E + (0.0 if self.kinds["C"] == "none" else (w @ C)[:, 0])
        return w + w * A + B, b

    def file_tensors(self) -> dict[str, Tensor]:
        zeros = {key: torch.zeros(shape) for key, shape in self.zeros.items()}
        return super().file_tensors() | zeros

    def expects(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {key: tuple(t.shape) for key, t in super().file_tensors().items()} | self.zeros
