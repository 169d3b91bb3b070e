"""What merging a layer would write, tried on a few inputs: the merged weight against the adapters
as they run.

Each layer is looked at by itself while its new weight is at hand, so it costs no second copy of
anything, and a merge file by file is probed like one in memory. All is computed in fp32 or better:
what differs is then the rounding of the new weight to its dtype, whose bound is known, or a fault.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.host import PROBES, Beneath, Host, LayerHost
from ..engine.site import Conv, Embedding
from ..errors import MergeError
from ..fast.plain import PLAIN

ROWS = 4  # inputs of a layer
WIDE = 4  # roundings of a whole row's norm by which an output may differ
EXACT = 3e-5  # and by how much for the arithmetic of the methods in fp32, of the outputs' size


@dataclass
class MergeReport:
    """What a merge has done.

    Args:
        adapters: what is merged.
        ratios: by layer, the largest difference between its outputs when merged and with the
            adapters, relative to what its dtype allows: below 1 is rounding; None: not tried.
        outputs: the largest difference between the model's outputs before and after, absolute;
            None where no batch was given.
    """

    adapters: list[str] = field(default_factory=list)
    ratios: dict[str, float | None] = field(default_factory=dict)
    outputs: float | None = None

    @property
    def sites(self) -> list[str]:
        """The layers into which they are."""
        return list(self.ratios)

    @property
    def probed(self) -> int:
        """How many of them were tried; the others have no input of a known shape."""
        return sum(ratio is not None for ratio in self.ratios.values())

    @property
    def difference(self) -> float:
        """The largest of ``ratios``."""
        return max([0.0, *(ratio for ratio in self.ratios.values() if ratio is not None)])

    @property
    def worst(self) -> str:
        """The layer where that is."""
        return next((p for p, ratio in self.ratios.items() if ratio == self.difference), "")

    def __str__(self) -> str:
        at = f", at {self.worst}" if self.worst else ""
        whole = "" if self.outputs is None else f"; outputs differ by {self.outputs:.3g} at most"
        return (
            f"{', '.join(self.adapters)}: {len(self.sites)} layers merged, {self.probed} probed; "
            f"their outputs differ by {self.difference:.2g} of what rounding allows{at}{whole}"
        )


class _Reports(threading.local):
    def __init__(self) -> None:
        self.now: list[MergeReport] = []  # those that this thread writes


_REPORTS = _Reports()


@contextmanager
def reporting() -> Iterator[MergeReport]:
    """Within the block, what is merged is noted."""
    report = MergeReport()
    _REPORTS.now.append(report)
    try:
        yield report
    finally:
        _REPORTS.now.pop()


def probe(host: Host, names: tuple[str, ...], new: dict[str, Tensor]) -> None:
    """Try what a merge of adapters would write into a layer.

    Raises:
        MergeError: it is nothing, or does something else than the adapters do.
    """
    if not new:
        raise MergeError(
            f"merging {list(names)} would leave {host.path} as it is, though they sit there; "
            "nothing was changed. Look at what their method's fold() gives"
        )
    if any(host.path in report.ratios for report in _REPORTS.now):
        return  # merge_and_unload computes all twice
    ratio = _ratio(host, names, new) if isinstance(host, LayerHost) else None
    if ratio is not None and not ratio <= 1:
        raise MergeError(
            f"merging {list(names)} into {host.path} would change what it computes: its outputs "
            f"would be {ratio:.3g} times as far from those with the adapters as its dtype allows. "
            "Nothing was changed; fold() and forward() of the method do not agree: run it unmerged"
        )
    for report in _REPORTS.now:
        report.ratios[host.path] = ratio


def _ratio(host: LayerHost, names: tuple[str, ...], new: dict[str, Tensor]) -> float | None:
    """How far outputs are from those with the adapters, of what is allowed; None: not known."""
    site = host.site
    raw, value = site.raw, new.get(site.parameter)
    x = _inputs(site)
    if x is None or value is None or raw.is_meta or not raw.is_floating_point():
        return None
    if not site.linear or type(raw) not in PLAIN or type(value) not in PLAIN:
        return None
    parts = [copy(part.precise()) for part in host.parts(names)]
    dtype = torch.promote_types(raw.dtype, torch.float32)
    if any(part.replaces or part.dtype is not dtype for part in parts):
        return None  # a copy's values are written as they are
    for part in parts:
        part.native = False  # which would compute in the layer's dtype
    x = x.to(raw.device)
    x = x.to(dtype) if x.is_floating_point() else x

    def base(x: Tensor) -> Tensor:
        b = site.bias
        return site.apply(x, site.weight.to(dtype), None if b is None else b.to(dtype))

    want = Beneath(host, parts, base, dtype, dtype)(x)
    w, b = site.to_matrix(value.to(dtype)), new.get("bias", site.bias)
    got = site.apply(x, w, None if b is None else b.to(dtype))
    size = want.abs().max() if isinstance(site, Embedding) else _norms(site, w, b)
    rounding = torch.finfo(value.dtype).eps * WIDE * size
    exact = EXACT * (want.abs().max() + torch.as_tensor(size).max())
    return float(((got - want).abs() / (rounding + exact).clamp(min=1e-30)).max())


def _norms(site: Any, w: Tensor, b: Tensor | None) -> Tensor:
    """The norm of each row of W, and its bias: the size of an output whose inputs are 1 or -1."""
    norms = torch.linalg.vector_norm(w, dim=-1)
    size: Tensor = site.outputs(norms if b is None else norms + b.abs())
    return size


def _inputs(site: Any) -> Tensor | None:
    """Inputs of 1 and -1, or ids, for a layer; the state of the random numbers stays."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"):
        if isinstance(site, Embedding):
            count = site.shape[1]
            some = torch.randint(count, (4 * ROWS,), generator=generator)
            return torch.cat([some, torch.arange(max(0, count - ROWS), count)])
        shape: tuple[int, ...] = (ROWS, site.shape[1])
        if isinstance(site, Conv):
            layer = site.layer
            spans = zip(layer.kernel_size, layer.dilation, strict=True)
            shape = (2, layer.in_channels, *(d * (k - 1) + 1 for k, d in spans))
        elif not site.product:
            return None
        return torch.randint(2, shape, generator=generator) * 2.0 - 1


PROBES.append(probe)


DEEP = 16  # roundings of a whole model's outputs


def tolerance(model: nn.Module) -> float:
    """How far a model's outputs may be from those before a merge, relative to their norm."""
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in kinds), default=0.0)
    return max(DEEP * eps, 1e-3)
