"""Sites: what kind of layer an adapter sits at.

Every weighted layer is one matrix W of shape (out, in): a linear layer's weight, the transpose of
GPT-2's ``Conv1D``, a flattened convolution kernel, an embedding's transpose (a linear layer over
one-hot inputs). A site reads that matrix, writes it back, and applies another one in the layer's
own geometry (stride, padding, lookup). Stacked expert weights carry a leading axis: W is (experts,
out, in).

A site never keeps the layer: it asks its host, since tools may exchange ``base_layer`` at any time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import dense

if TYPE_CHECKING:
    from .host import Host

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Standing:
    """A layer on its own, where a site asks for a host."""

    def __init__(self, layer: nn.Module, path: str = "") -> None:
        self.base_layer, self.path = layer, path

    def pristine(self, name: str) -> Tensor:
        return self.base_layer.get_parameter(name)


class Site:
    """``nn.Linear`` and whatever computes ``x @ W.T + b``; W is ``weight`` itself."""

    parameter = "weight"
    pointwise = True  # the output at a position depends on the input at that position only
    linear = True  # applying W + D is applying W and applying D
    product = True  # it computes x W' + b
    lead: tuple[int, ...] = ()  # axes in front of (out, in)
    ones: tuple[int, ...] = ()  # a one for each axis of a kernel

    def __init__(self, host: Host | Standing) -> None:
        self.host = host
        out, in_ = self.measure()
        self.shape = (out, in_)

    @property
    def layer(self) -> Any:
        return self.host.base_layer

    @property
    def path(self) -> str:
        """The layer's name in the user's model."""
        return self.host.path

    @property
    def name(self) -> str:
        """The layer's path; for a bare parameter its own full name."""
        return self.path

    @property
    def raw(self) -> Tensor:
        """The stored weight as it was before any merging."""
        return self.host.pristine(self.parameter)

    @property
    def weight(self) -> Tensor:
        """W, (..., out, in)."""
        return self.to_matrix(dense(self.raw, self.path))

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.layer, "bias", None)
        return self.host.pristine("bias") if isinstance(bias, Tensor) else None

    def measure(self) -> tuple[int, int]:
        """(out, in) from the layer's attributes: a packed or sharded weight has other shapes."""
        out, in_ = (
            getattr(self.layer, "out_features", None),
            getattr(self.layer, "in_features", None),
        )
        if isinstance(out, int) and isinstance(in_, int):
            return out, in_
        out, in_ = self.to_matrix(self.raw).shape[-2:]
        return out, in_

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Stored weight -> W."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """W -> stored weight."""
        return matrix

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the layer computes with another W and bias."""
        return F.linear(x, matrix, bias)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``apply(x, b @ a)`` without the product; a (r, in), b (out, r)."""
        return self.expand(self.reduce(x, a), b)

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        """The first half of ``low_rank``: r channels, for each group of a convolution."""
        return self.apply(x, a)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        """The second half of ``low_rank``."""
        return F.linear(h, b)

    def usual(self, layer: nn.Module) -> bool:
        """Whether the layer's own code is known to compute x W' + b and no more."""
        return type(layer).forward is nn.Linear.forward and "forward" not in layer.__dict__

    def outputs(self, v: Tensor) -> Tensor:
        """A vector (out,) shaped to broadcast over the layer's output."""
        return v

    def inputs(self, v: Tensor) -> Tensor:
        """A vector (in channels,) shaped to broadcast over the layer's input."""
        return v

    @property
    def in_channels(self) -> int:
        return self.shape[1]

    def input_channel(self) -> Tensor | None:
        """Which input channel an entry of W reads, (1 or out, in); None: it is its column."""
        return None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The inputs of one output, before flattening."""
        return (self.shape[1],)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which PEFT stores the factors A and B of a rank-r update."""
        n = r * math.prod(self.lead)
        return (n, *self.in_shape), (self.shape[0], n, *self.ones)

    def from_factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A (..., r, in) and B (..., out, r) -> stored factors; the inverse of ``as_factors``."""
        if self.lead:
            a, b = a.flatten(0, -2), b.permute(-2, -1, *range(b.ndim - 2)).flatten(1)
        return a.reshape(-1, *self.in_shape), b.reshape(*b.shape, *self.ones)

    def channel_shape(self) -> tuple[int, ...]:
        """The shape in which PEFT stores one number per output channel."""
        return (1, self.shape[0], *self.ones) if self.ones else (*self.lead, self.shape[0])

    def describe(self) -> str:
        """``Linear(4096, 4096)``: the layer's kind with inputs and outputs."""
        return f"{type(self.layer).__name__}({self.shape[1]}, {self.shape[0]})"


class Conv1D(Site):
    """transformers' ``Conv1D``, the transposed linear layer of GPT-2; W is ``weight.T``."""

    def measure(self) -> tuple[int, int]:
        in_, out = self.raw.shape
        return out, in_

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def usual(self, layer: nn.Module) -> bool:
        own = type(layer).forward.__qualname__ == "Conv1D.forward"
        return own and "forward" not in layer.__dict__


class Conv(Site):
    """``nn.Conv1d/2d/3d``; W is the kernel flattened to (out, in / groups * prod(kernel))."""

    pointwise = product = False

    @property
    def ones(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) * len(self.layer.kernel_size)

    def measure(self) -> tuple[int, int]:
        layer = self.layer
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *self.in_shape)

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer._conv_forward(x, self.from_matrix(matrix), bias)
        return y

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        return self.apply(x, a.repeat(self.layer.groups, 1))

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        b = b.reshape(*b.shape, *self.ones)
        return CONV[len(self.ones)](h, b, groups=self.layer.groups)

    def outputs(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *self.ones)

    inputs = outputs

    @property
    def in_channels(self) -> int:
        return int(self.layer.in_channels)

    def input_channel(self) -> Tensor | None:
        groups = self.layer.groups  # an output channel reads the input channels of its own group
        index = torch.arange(self.in_channels).reshape(groups, -1)
        index = index.repeat_interleave(math.prod(self.layer.kernel_size), dim=1)
        return index if groups == 1 else index.repeat_interleave(self.shape[0] // groups, dim=0)

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.layer.in_channels // self.layer.groups, *self.layer.kernel_size)

    def describe(self) -> str:
        layer = self.layer
        size = "x".join(str(k) for k in layer.kernel_size)
        groups = f", groups={layer.groups}" if layer.groups > 1 else ""
        return f"{type(layer).__name__}({layer.in_channels}, {layer.out_channels}, {size}{groups})"


class Embedding(Site):
    """``nn.Embedding``; W is ``weight.T``. A model's own ``embed_scale`` multiplies the output."""

    pointwise = product = False

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.layer.max_norm is None  # renormalised rows are no linear function of the table

    def measure(self) -> tuple[int, int]:
        return self.layer.embedding_dim, self.layer.num_embeddings

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = F.embedding(x, matrix.mT, self.layer.padding_idx)
        if self.layer.max_norm is not None:  # as torch does, but without writing into the table
            norm = rows.norm(p=self.layer.norm_type, dim=-1, keepdim=True)
            rows = torch.where(
                norm > self.layer.max_norm, rows * (self.layer.max_norm / (norm + 1e-7)), rows
            )
        return self.scaled(rows)

    def reduce(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.mT, self.layer.padding_idx)

    def expand(self, h: Tensor, b: Tensor) -> Tensor:
        return self.scaled(F.linear(h, b))

    def scaled(self, rows: Tensor) -> Tensor:
        """``rows`` times the model's own embedding scale, where it has one (Gemma)."""
        scale = getattr(self.layer, "embed_scale", None)
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)

    def describe(self) -> str:
        return (
            f"{type(self.layer).__name__}({self.layer.num_embeddings}, {self.layer.embedding_dim})"
        )


class ParameterSite(Site):
    """One parameter of any module, read by the module's own code: folded, never called."""

    pointwise = product = False

    def __init__(self, host: Host | Standing, parameter: str) -> None:
        self.parameter = parameter
        super().__init__(host)
        self.lead = tuple(self.raw.shape[:-2])

    @property
    def bias(self) -> None:
        return None

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}"

    @property
    def transposed(self) -> bool:
        """Stacked experts are (experts, in, out) unless the module says that they are not."""
        return self.raw.ndim == 3 and getattr(self.layer, "is_transposed", True)

    def measure(self) -> tuple[int, int]:
        if self.raw.ndim < 2:  # a bias or a gain: only whole replacement makes sense
            return self.raw.numel(), 1
        out, in_ = self.to_matrix(self.raw).shape[-2:]
        return out, in_

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        raise TypeError(
            f"{self.path}.{self.parameter} is read by its module's own code; only its fold can be "
            "used"
        )

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.raw.ndim < 2:
            raise ValueError(
                f"{self.name} has the shape {tuple(self.raw.shape)}: low-rank updates need a matrix"
            )
        return super().factor_shapes(r)

    def describe(self) -> str:
        shape = ", ".join(str(n) for n in self.raw.shape)
        return f"{type(self.layer).__name__}.{self.parameter}({shape})"


def as_factors(a: Tensor, b: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Factors as PEFT stores them -> A (..., r, in) and B (..., out, r).

    For stacked experts the expert index is slowest in A's rows and fastest in B's columns.
    """
    if not lead:
        return (a, b) if a.ndim == b.ndim == 2 else (a.flatten(1), b.flatten(1))
    a, b = a.reshape(*lead, -1, a.shape[1]), b.reshape(len(b), -1, *lead)
    return a, b.permute(2, 0, 1)


# type, or the qualified name of a type of an optional library -> its site; looked up along the MRO
KINDS: dict[type | str, type[Site]] = {
    nn.Linear: Site,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
    "transformers.pytorch_utils.Conv1D": Conv1D,
}


def kind_of(layer: nn.Module) -> type[Site] | None:
    """The site class for a layer, or None where the layer is not a known weighted layer."""
    for cls in type(layer).__mro__:
        found = KINDS.get(cls) or KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found:
            return found
    return None


def register_site(layer_type: type[nn.Module], site: type[Site] = Site) -> None:
    """Make layers of ``layer_type`` adaptable.

    Args:
        layer_type: the class of the layer; subclasses follow.
        site: how its weight is a matrix; ``Site`` itself for a layer that computes ``x @ weight.T +
            bias``.
    """
    KINDS[layer_type] = site
