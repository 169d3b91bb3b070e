"""Reports: what is adapted, active, trainable and merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.host import Host
from ..engine.root import Grafted
from ..engine.tree import mark
from ..fast import plan
from ..fast.shards import split
from .canary import unused_sites

if TYPE_CHECKING:
    from .effect import Effect


@dataclass
class Row:
    """One adapter at one place."""

    site: str
    layer: str
    adapter: str
    method: str
    rank: int | None
    scale: float
    dtype: str
    device: str
    active: bool
    trainable: bool
    merged: bool
    path: str  # how its layer computes: fast, or plain and why
    change: float | None  # norm of the update relative to the weight's; None: not to be computed


class Adapters(list[Row]):
    """The rows; printing gives a table in which equal layers share a line."""

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [asdict(row) for row in self]

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self:
            name = row.site.rpartition(".")[2]
            key = (
                name,
                row.layer,
                row.adapter,
                row.method,
                row.rank,
                row.scale,
                row.dtype,
                row.device,
                row.active,
                row.trainable,
                row.merged,
                row.path,
            )
            groups.setdefault(key, []).append(row)
        head = (
            "site",
            "layer",
            "adapter",
            "method",
            "rank",
            "scale",
            "dtype",
            "device",
            "state",
            "change",
            "path",
        )
        lines = [head] + [_line(rows) for rows in groups.values()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    __repr__ = __str__


def _line(rows: list[Row]) -> tuple[str, ...]:
    first = rows[0]
    site = first.site if len(rows) == 1 else f"{first.site.rpartition('.')[2]} x{len(rows)}"
    words = [
        word
        for word, on in (
            ("active", first.active),
            ("trainable", first.trainable),
            ("merged", first.merged),
        )
        if on
    ]
    changes = [row.change for row in rows if row.change is not None]
    low, high = (min(changes), max(changes)) if changes else (0.0, 0.0)
    change = (
        "-"
        if not changes
        else f"{low:.2%}"
        if f"{low:.2%}" == f"{high:.2%}"
        else f"{low:.2%} to {high:.2%}"
    )
    return (
        site,
        first.layer,
        first.adapter,
        first.method,
        "-" if first.rank is None else str(first.rank),
        f"{first.scale:g}",
        first.dtype.removeprefix("torch."),
        first.device,
        " ".join(words) or "-",
        change,
        first.path,
    )


def adapters(root: Grafted) -> Adapters:
    """A row for each part of each adapter at each layer."""
    return Adapters(row for path, host in root.hosts().items() for row in _rows(path, host))


def _rows(path: str, host: Host) -> Iterator[Row]:
    switch = host.switch
    for name in host.adapters:
        for key, part in host.parts_of(name):
            site = host.site_of(key)
            own, shared = part.state_dict(keep_vars=True).values(), part.shared
            every = (*own, *(() if shared is None else shared.parameters()))
            tensors = [t for t in every if t.is_floating_point()]
            like = tensors[0] if tensors else next(host.base_layer.parameters())
            yield Row(
                site=path
                if site is None or site.parameter in ("weight", "bias")
                else f"{path}.{site.parameter}",
                layer=type(host.base_layer).__name__ if site is None else site.describe(),
                adapter=name,
                method=type(part).__name__,
                rank=part.rank(),
                scale=float(part.scale),
                dtype=str(like.dtype),
                device=str(like.device),
                active=name in switch.active and switch.enabled,
                trainable=any(t.requires_grad for t in tensors),
                merged=name in host.merged_adapters,
                path=plan.path(host, part),
                change=_change(part, site),
            )


@torch.no_grad()
def _change(part: Any, site: Any) -> float | None:
    if site is None or not site.raw.is_floating_point() or site.raw.ndim < 2 or site.raw.is_meta:
        return None
    if split(site.raw):
        return None
    w = site.weight.to(part.dtype)
    change = float(part.delta_norm(w) / w.norm().clamp(min=1e-12))
    return None if change != change else change  # a number only where there is an update


def count(model: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of a model; a tensor that is used at several places counts once."""
    seen: set[Any] = set()
    trainable = every = 0
    for p in model.parameters():
        if mark(p) in seen:
            continue
        seen.add(mark(p))
        n = logical_numel(p)
        every += n
        trainable += n if p.requires_grad else 0
    return trainable, every


def logical_numel(weight: Tensor) -> int:
    """How many numbers a parameter stands for; 4-bit weights hold two a byte."""
    count = weight.numel() or getattr(weight, "ds_numel", 0)
    if type(weight).__name__ == "Params4bit":
        storage = getattr(weight, "quant_storage", None)
        return int(count) * 2 * (storage.itemsize if storage is not None else 1)
    return int(count)


@dataclass
class TunerLayerStatus:
    """PEFT's report on one layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """PEFT's report on the model."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: dict[str, int] | None = field(default=None)


def _kinds(host: Host) -> set[str]:
    return {type(part).__name__ for name in host.adapters for _, part in host.parts_of(name)}


def layer_status(root: Grafted) -> list[TunerLayerStatus]:
    """A report for each adapted layer."""
    switch = root.switch
    return [
        TunerLayerStatus(
            name=f"model.{path}",
            module_type="+".join(sorted(_kinds(host))),
            enabled=switch.enabled,
            active_adapters=list(switch.active),
            merged_adapters=list(host.merged_adapters),
            requires_grad={
                name: _agreed(p.requires_grad for p in parts.parameters())
                for name, parts in host.adapters.items()
            },
            available_adapters=sorted(host.adapters),
            devices={
                name: sorted({p.device.type for p in parts.parameters()})
                for name, parts in host.adapters.items()
            },
        )
        for path, host in root.hosts().items()
    ]


def model_status(model: Reports) -> TunerModelStatus:
    """The layers' reports, put together."""
    root = model.base_model
    layers, (trainable, total) = layer_status(root), count(model)
    names = sorted({n for layer in layers for n in layer.available_adapters})
    flags = {
        n: [layer.requires_grad[n] for layer in layers if n in layer.requires_grad] for n in names
    }
    devices = {n: sorted({d for layer in layers for d in layer.devices.get(n, ())}) for n in names}
    return TunerModelStatus(
        base_model_type=type(root.model).__name__,
        adapter_model_type=type(root).__name__,
        peft_types={n: c.method for n, c in root.switch.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=root.switch.enabled,
        active_adapters=list(root.switch.active),
        merged_adapters=sorted({n for layer in layers for n in layer.merged_adapters}),
        requires_grad={n: _agreed(flags[n]) for n in names},
        available_adapters=names,
        devices=devices,
    )


def _agreed(flags: Any) -> bool | str:
    found = Counter(flags)
    return next(iter(found)) if len(found) == 1 else "irregular" if found else False


class Reports(nn.Module):
    """The reports of a ``PeftModel``, as its methods."""

    base_model: Grafted

    def adapters(self) -> Adapters:
        """What is adapted, where, and how: a table when printed, data when read."""
        return adapters(self.base_model)

    def assert_effective(self, *args: Any, **kwargs: Any) -> Effect:
        """Check with one batch that the active adapters do something, as a test of a training does.

        Nothing is changed: no weight, no ``grad``, no state of the random numbers.

        Args:
            *args: what the model is called with; a single mapping is taken as keywords.
            **kwargs: likewise; with labels, gradients are those of the loss, else of a random sum
                of the outputs.

        Raises:
            TrainingError: a layer with an adapter is not called by the module around it, a tensor
                that trains gets no gradient or none that is finite, a place none but zeros; or
                nothing trains, and the outputs are those of the base model.
            StateError: no adapter is active, or adapters are merged.
        """
        from .effect import assert_effective

        return assert_effective(self, args, kwargs)

    def unused_sites(self) -> list[str]:
        """Places of adapters whose layers have not run since their training began, such as experts
        that no token chose; empty before it.
        """
        return unused_sites(self.base_model.model)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are; shared tensors count once."""
        return count(self)

    def print_trainable_parameters(self) -> None:
        """Print both counts and the share, in PEFT's words."""
        trainable, every = count(self)
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: "
            f"{100 * trainable / every:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """PEFT's report on each adapted layer."""
        return layer_status(self.base_model)

    def get_model_status(self) -> TunerModelStatus:
        """PEFT's report on the model."""
        return model_status(self)
