"""Adapter: what a method does at one layer.

An adapter answers two questions about the layer beneath it, and the answers must agree::

    forward(x, layer)   what comes out, given an input
    fold(w, b)          which weight and bias would give the same output

``forward(x, layer) == layer.site.apply(x, *fold(*layer.weights()))`` in eval mode, for every method
on every kind of layer: the law that `tests/test_laws.py` checks. Either answer suffices where it
determines the other.

An adapter never casts: x and what it gets from ``layer`` come in its own dtype. It never asks which
layer it is at: geometry is the site's.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..fast import choose
from ..fast.shards import readable_now
from ..fast.tensors import Staying, kept, lasting
from .site import Site

if TYPE_CHECKING:
    from .host import Beneath


NOTHING = torch.empty(0, 0), torch.empty(0, 0)  # factors of rank 0


class Part(nn.Module):
    """Tensors of an adapter that are kept together, with their names in a PEFT file."""

    keys: dict[str, str] = {}  # tensor name here -> its name in a PEFT file

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}  # what a schedule remembers from step to step

    _hf_hook = Staying()

    @property
    def dtype(self) -> torch.dtype:
        every = itertools.chain(self.parameters(), self.buffers())
        return next((t.dtype for t in every if t.is_floating_point()), torch.float32)

    def file_tensors(self) -> dict[str, Tensor]:
        """What is saved, under PEFT's names."""
        return {self.keys[n]: t for n, t in lasting(self)}

    def expects(self, config: Any) -> dict[str, tuple[int, ...]]:
        """The shapes that a file saved with ``config`` has, under PEFT's names."""
        return {key: tuple(tensor.shape) for key, tensor in self.file_tensors().items()}

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        """Take the values of a file, under PEFT's names."""
        for name, mine in lasting(self):
            if (key := self.keys[name]) in tensors:
                mine.copy_(tensors[key])

    def training_state(self) -> dict[str, Tensor]:
        """What a schedule needs to be resumed beyond the file, such as its statistics."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers()), **self.seen}

    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what ``training_state`` gave."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, mine in own.items():
            mine.copy_(tensors[name])
        device = next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device
        self.seen = {n: t.to(device).clone() for n, t in tensors.items() if n not in own}


class Shared(Part):
    """What all the adapters of one name have in common; in a PEFT file it stands at the root."""

    resumes = False  # whether training goes on from more than a file holds

    def training_state(self) -> dict[str, Tensor]:
        return super().training_state() if self.resumes else {}

    def start(self) -> None:
        """Fill the tensors with the values that training starts from; not called on loading."""


class Adapter(Part):
    """One method at one site.

    Args:
        config: the method's config, already resolved for this site's path.
        site: the layer's geometry; ``site.shape`` is (out, in), ``site.lead`` the axes of stacked
            weights.
        shared: what ``config.share`` made for all adapters of this name.
    """

    stacked = False  # whether it takes weights with leading axes, as of experts
    beside = False  # acts on what a module gives, whatever the module is
    together = False  # what a row gets depends on the adapter's other rows in the batch
    drawn: tuple[str, ...] = ()  # buffers that follow from a seed, and are in no file of PEFT's
    reads = False  # what it derives follows from other adapters at its layer
    inside = False  # acts within a module, on all rows of a batch at once: see ``around``
    relays: tuple[str, ...] = ()  # modules that a later part alone reads, so the last one's idle
    ready = False  # its values come from other files than its own
    replaces = False  # fold puts other values in place and computes nothing
    FORBIDS: dict[str, str] = {}  # capability -> why mathematics forbids it
    scale: float | Tensor  # a factor of the update, where the method has one
    skip: float = 0.0  # probability, in training, that the adapter is left out of a forward
    absent: bool = False  # it was left out of the last forward in training
    sums = False  # it adds a low-rank product to the layer: see ``terms``
    scales = False  # that sum is multiplied by ``multiplier``
    native = False  # it computes in the layer's dtype, whatever that of its own tensors
    linear = ""  # a tensor in which the update is linear
    times: float = 1.0  # how many times PEFT applies the update that a file holds
    prefix: str = ""  # what stands between the layer's path and the key in a PEFT file

    @property
    def scaler(self) -> Any:
        """``scale``; in compiled code as a tensor, since a number would be part of the program. In
        fp32: where torch finds a single number in fp64, it compiles twice."""
        held = self.__dict__.get("held_scale")
        return self.scale if held is None or not torch.compiler.is_compiling() else held

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":
            number = isinstance(value, (float, int))
            held = torch.tensor(value, dtype=torch.float32, device="cpu") if number else None
            self.__dict__["held_scale"] = held
        if not kept(self, name, value):
            super().__setattr__(name, value)

    def __init_subclass__(cls, config: type[Any] | None = None, **kwargs: Any) -> None:
        """An adapter's class; ``config``: the class of configs that ask for it."""
        super().__init_subclass__(**kwargs)
        if config is not None:
            config.ADAPTER = cls
        if "sums" not in cls.__dict__ and {"forward", "branch", "dropped"} & cls.__dict__.keys():
            cls.sums = False

    def __init__(
        self, config: Any = None, site: Site | None = None, shared: Shared | None = None
    ) -> None:
        super().__init__()
        self.scale = 1.0
        self.common = (shared,)  # in a tuple: referred to, not owned

    @property
    def shared(self) -> Any:
        """What the adapters of this name have in common, where the method has that."""
        return readable_now(self.common[0])

    def start(self, site: Site) -> None:
        """Fill the tensors with the values that training starts from; not called on loading."""

    def derive(self, site: Site) -> None:
        """Compute what follows from the base weight and is in no file; always called."""

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adapted weight (..., out, in) and bias (out,)."""
        raise NotImplementedError(f"{type(self).__name__} cannot be written as a weight")

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        """The adapted output; override where it is cheaper than applying the folded weight."""
        return layer.site.apply(x, *self.fold(*layer.weights()))

    def forward_transposed(self, x: Tensor, layer: Beneath) -> Tensor:
        """The output of a layer that uses the adapted weight transposed: a tied weight's end."""
        w, b = layer.weights()
        return layer.site.apply(x, self.fold(w.mT, None)[0].mT, b)

    def ahead(self, x: Tensor, context: dict[str, Any]) -> Tensor | None:
        """Where it acts beside: what is added to the input x; None: nothing."""
        return None

    def added(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Where it acts beside: what is added to an output y, from y and the input x."""
        return None

    def passed(self, y: Tensor, context: dict[str, Any]) -> None:
        """Where it acts beside: called with the output."""

    def around(
        self,
        run: Callable[[], Any],
        module: nn.Module,
        parts: Sequence[Adapter],
        choice: Tensor | None,
    ) -> Any:
        """Where it acts inside: the output of ``run()``, which runs ``module``, with ``parts``, of
        which this is the first; ``choice`` (rows,): which of them each row has, ``len(parts)`` for
        none; None: every row has all.
        """
        raise NotImplementedError

    def skipped(self) -> bool:
        """Whether this forward goes without the adapter (``module_dropout`` in PEFT)."""
        if not (self.training and self.skip > 0):
            return False
        self.absent = bool(torch.rand(()) < self.skip)
        return self.absent

    def instead(self) -> nn.Module | None:
        """A module that runs in the layer's place, where this part has one."""
        return None

    def precise(self) -> Adapter:
        """This adapter with at least fp32 tensors, for merging."""
        if self.dtype.itemsize >= 4 or self.replaces:
            return self
        new = copy.deepcopy(self).float()
        if new.shared is not None:
            new.shared.float()
        return new

    def tied_tensors(self, transposed: bool) -> dict[str, Tensor]:
        """What PEFT's file holds for the other end of a tied weight, a copy in other words."""
        return {}

    def hides(self, beneath: Adapter) -> bool:
        """Whether an adapter beneath this one has no effect any more."""
        return False

    def delta_norm(self, w: Tensor) -> float:
        """Frobenius norm of the change to the weight w (..., out, in), for reports; or nan."""
        return math.nan if "merge" in self.FORBIDS else float((self.fold(w, None)[0] - w).norm())

    def rank(self) -> int | None:
        """The rank of the update, where the method has one."""
        return getattr(self, "r", None)

    def factored(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A, B and what is added to the bias, where the update is B A whatever the weight is."""
        return None

    def terms(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """Where it ``sums`` k B A: A (r, in), B (out, r), k, and what the bias gets (out,)."""
        raise NotImplementedError

    def multiplier(self, w: Tensor) -> Tensor:
        """Where it ``scales`` the sum: by what (out,), given w, before the bias is added."""
        raise NotImplementedError

    def rate(self) -> float | None:
        """The dropout of the input that a forward has now; None: not that of ``nn.Dropout``."""
        return 0.0

    def products(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A, B and a shift where forward is now layer(x) + B A dropped(x) + shift; else None."""
        return None

    def unscaled(self) -> tuple[Tensor, Tensor, float, Tensor | None] | None:
        """A, B, s and a shift, where ``products`` are A, s B and the shift; None: s is in B."""
        return None

    def gains(self) -> tuple[Tensor | None, Tensor | None] | None:
        """Gains of the inputs and of the outputs, where it only multiplies by them; else None."""
        return None

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = super().file_tensors()
        if self.times != 1:
            tensors[self.keys[self.linear]] = getattr(self, self.linear) / self.times
        return tensors

    def take(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        super().take(tensors, config)
        if self.times != 1 and self.keys[self.linear] in tensors:
            getattr(self, self.linear).mul_(self.times)


class Additive(Adapter):
    """W + delta(): give ``delta``, and ``branch`` too where there is a cheaper way to apply it."""

    dropout: nn.Module  # on the branch's input; on the class, a value would hide the instance's

    def __init__(
        self, config: Any = None, site: Site | None = None, shared: Shared | None = None
    ) -> None:
        super().__init__(config, site, shared)
        self.dropout = nn.Identity()

    def delta(self) -> Tensor:
        """The update (..., out, in)."""
        raise NotImplementedError

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.delta(), b

    def branch(self, x: Tensor, site: Site) -> Tensor:
        """The update applied to x."""
        return site.apply(x, self.delta())

    def dropped(self, x: Tensor) -> Tensor:
        """The branch's input in training; ids have no dropout."""
        if type(self.dropout) is nn.Dropout and x.is_floating_point():
            return choose.dropped(x, self.rate() or 0.0, id(self))
        return self.dropout(x) if x.is_floating_point() else x

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        return layer(x) + self.branch(self.dropped(x), layer.site)

    def rate(self) -> float | None:
        if type(drop := self.dropout) is nn.Identity:
            return 0.0
        return (drop.p if self.training else 0.0) if type(drop) is nn.Dropout else None

    def delta_norm(self, w: Tensor) -> float:
        return float(self.delta().norm())


class LowRank(Additive):
    """delta = B A with A (..., r, in) and B (..., out, r): many methods are only ``factors``."""

    r: int
    sums = True
    products_in: tuple[bool, ...] = ()  # where another branch is B A x: in eval mode, in training

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (..., r, in) and B (..., out, r), all scales included."""
        a, b, s = self.leaves()
        return a, s * b

    def leaves(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """A, B and s, where ``factors`` are A and s B: for a method that has a scale."""
        raise NotImplementedError

    def unscaled(self) -> tuple[Tensor, Tensor, float, Tensor | None] | None:
        if type(self).factors is not LowRank.factors:
            return None
        a, b, s = self.leaves()
        return None if isinstance(s, Tensor) else (a, b, s, self.shift())

    def shift(self) -> Tensor | None:
        """What is added to the bias (out,), where the method has that."""
        return None

    def factored(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        return *self.factors(), self.shift()

    def terms(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        apart = self.unscaled()
        return (*self.factors(), 1.0, self.shift()) if apart is None else apart

    def products(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        plain = self.sums or (
            self.training in self.products_in and type(self).forward is LowRank.forward
        )
        return (*self.factors(), self.shift()) if plain and not self.scales else None

    def delta(self) -> Tensor:
        a, b = self.factors()
        return b @ a

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = self.shift()
        return w + self.delta(), b if shift is None else shift + (0 if b is None else b)

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        y, shift = super().forward(x, layer), self.shift()
        return y if shift is None else y + layer.site.outputs(shift)

    def branch(self, x: Tensor, site: Site) -> Tensor:
        return site.low_rank(x, *self.factors())

    def forward_transposed(self, x: Tensor, layer: Beneath) -> Tensor:
        a, b = self.factors()
        return layer(x) + layer.site.low_rank(x, b.mT, a.mT)

    def delta_norm(self, w: Tensor) -> float:
        a, b = (f.double() for f in self.factors())  # ||BA||^2 = tr((B'B)(AA')): no dense product
        square = ((b.mT @ b) * (a @ a.mT)).sum()
        return float(square.clamp(min=0).sqrt())
