"""Host: stands where a layer stood, and runs the active adapters around it. Written once.

``LayerHost`` stands for a layer that is one matrix (linear, convolution, embedding); ``ModuleHost``
(module.py) for any other module, whose parameters are folded or whose whole copy is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import MergeError, StateError
from ..fast import batch, choose
from ..fast.rows import each
from ..fast.shards import in_parts, parts_in
from ..fast.tensors import cast, fetched, no_autocast, owner_of, steady, unwritable
from ..fast.watch import Kept
from .adapter import Adapter, Part, Shared
from .site import Embedding, Site, kind_of
from .switch import BASE, Switch

# PEFT's names of things on a layer: attribute -> its value for a host; see model/layer.py
NAMES: dict[str, Callable[[Host], Any]] = {}
# asked before what merging would write counts: of a host, adapters, values; see model/probe.py
PROBES: list[Callable[[Host, tuple[str, ...], dict[str, Tensor]], None]] = []


class Host(nn.Module):
    """Base of both hosts: around the user's ``layer``, which was at ``path`` in the model."""

    adapters: nn.ModuleDict  # adapter name -> ModuleDict of its parts here
    switch: Switch

    def __init__(self, layer: nn.Module, switch: Switch, path: str) -> None:
        super().__init__()
        self.base_layer = layer
        self.adapters = nn.ModuleDict()
        self.switch, self.path = switch, path
        self.merged_adapters: tuple[str, ...] = ()
        self.originals: dict[str, Tensor] = {}  # the untouched parameters, while merged
        self.kept = True  # False: merged for good, the originals are gone
        self.stacks = Kept()  # of mixed batches
        self.train(layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.switch.current()
        if call.rows is not None:
            return self.mixed(call.rows, args, kwargs)
        return self.choose(call.active, args, kwargs)

    def choose(self, active: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run with the adapters among ``active`` that are here."""
        names = self.present(active)
        if names == self.merged_adapters:
            return self.as_it_is(*args, **kwargs)
        self.need_originals()
        return self.run(names, args, kwargs)

    def need_originals(self) -> None:
        """Stop where other adapters than the merged ones are asked for and the base is gone."""
        if not self.kept:
            raise StateError(
                f"{self.path} was merged with keep=False, so only {list(self.merged_adapters)} can "
                "run and nothing can be undone; load the base model again for other adapters"
            )

    def as_it_is(self, *args: Any, **kwargs: Any) -> Any:
        """The layer with the weights that it has now."""
        return self.base_layer(*args, **kwargs)

    def mixed(self, rows: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each row with its own adapter."""
        return batch.split(self, rows, args, kwargs)

    def lane(self, name: str) -> tuple[str, ...]:
        """Which adapters run for a row of a mixed batch that has this name."""
        return () if name == BASE else self.present((name,))

    def present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        here = self._modules["adapters"]._modules  # type: ignore[union-attr]
        return tuple([name for name in names if name in here])

    def parts(self, names: tuple[str, ...]) -> list[Adapter]:
        """The adapters of these names at this layer, the lowest first; above are those that are no
        weight, so that the others can be folded.
        """
        here, parts = self._modules["adapters"]._modules, []  # type: ignore[union-attr]
        for name in names:
            own = here[name]._modules.values() if name in here else ()  # type: ignore[union-attr]
            parts += [part for part in own if isinstance(part, Adapter)]
        return parts if len(parts) < 2 else sorted(parts, key=lambda one: "merge" in one.FORBIDS)

    def run(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def site_of(self, key: str) -> Site | None:
        """The site of the part called ``key``; None for a part that replaces the whole module."""
        raise NotImplementedError

    def parts_of(self, name: str) -> list[tuple[str, Adapter]]:
        """The parts of one adapter at this layer, with their keys; none where it is not here."""
        parts: Any = self.adapters[name] if name in self.adapters else {}
        return [(key, part) for key, part in parts.items() if isinstance(part, Adapter)]

    def shared_of(self, name: str) -> Shared | None:
        """What the parts of an adapter share, where this layer keeps it."""
        parts: Any = self.adapters[name] if name in self.adapters else {}
        return next((part for part in parts.values() if isinstance(part, Shared)), None)

    def set_requires_grad(self, names: str | Sequence[str], on: bool = True) -> None:
        """Freeze or unfreeze adapters at this layer."""
        for name in self.present((names,) if isinstance(names, str) else tuple(names)):
            for parameter in self.adapters[name].parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(on)
            self.switch.flags.trains |= {name} if on else set()

    def hidden(self, names: tuple[str, ...]) -> str | None:
        """Which of these adapters has no effect here, in words; None where all have one."""
        parts = [(name, *part) for name in names for part in self.parts_of(name)]
        for i, (name, key, part) in enumerate(parts):
            for low, place, other in parts[:i]:
                if low != name and not self.apart(key, place) and part.hides(other):
                    return (
                        f"{name!r} puts its values in place of those of {low!r} at {self.path}, as "
                        "copies by modules_to_save and a task_type's head do"
                    )
        return None

    def apart(self, key: str, other: str) -> bool:
        """Whether the part called ``key`` is at one parameter and ``other`` not at the same one."""
        mine, theirs = self.site_of(key), self.site_of(other)
        return mine is not None and (theirs is None or mine.parameter != theirs.parameter)

    def need_site(self, key: str) -> Site:
        """The site of a part that has one."""
        site = self.site_of(key)
        assert site is not None
        return site

    def adopt(self, name: str, key: str, part: Part) -> None:
        """Take a part of an adapter in, or what all its parts share."""
        parts = self.adapters._modules  # not through ModuleDict, to which "keys" is no name
        own = parts.setdefault(name, nn.ModuleDict().train(self.training))
        own._modules[key] = part.train(self.training)
        self.switch.flags.add(name, part)
        if isinstance(part, Adapter):
            hides = type(part).hides is not Adapter.hides
            self.switch.flags.note(name, hides, part.reads)

    def folded(self, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """The parameters that would do what the base and these adapters do, in fp32 or better."""
        raise NotImplementedError

    # -- merging: new tensors stand in for the originals, which come back as they were

    def pristine(self, name: str) -> Tensor:
        """A parameter of the layer as it was before any merging; ``name`` may be dotted."""
        if name in self.originals:
            return self.originals[name]
        return fetched(*owner_of(self.base_layer, name))

    @torch.no_grad()
    def prepare(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The parameters that merging ``names`` would write; nothing is changed.

        Raises:
            MergeError: a value is not finite, or the layer has no place for it.
            StateError: processes hold the layer in parts.
        """
        new: dict[str, Tensor] = {}
        names = self.present(names)
        if names and (how := parts_in([self.base_layer, *self.parts(names)])):
            raise in_parts(self.path, how, "merged")
        self.need_originals()
        for name, part in [(n, part) for n in names for _, part in self.parts_of(n)]:
            if reason := part.FORBIDS.get("merge"):
                raise MergeError(f"{name!r} cannot be merged into {self.path}: {reason}")
        with no_autocast(self.base_layer), steady(self.parts(names)):
            for key, value in self.folded(names) if names else ():
                old = self.pristine(key)
                if reason := unwritable(owner_of(self.base_layer, key)[0], old):
                    raise MergeError(f"{self.path}.{key} {reason}: graft merge FOLDER -o OUT")
                value = value.to(old.dtype).contiguous().clone()
                if not value.is_meta and not torch.isfinite(value).all():
                    raise MergeError(
                        f"merging {list(names)} would make {self.path}.{key} not finite in "
                        f"{old.dtype}; nothing was changed. Look at model.adapters() for an update "
                        "that is far larger than the weight"
                    )
                parameter = isinstance(old, nn.Parameter)
                new[key] = nn.Parameter(value, requires_grad=False) if parameter else value
            for probe in PROBES if names else ():
                probe(self, names, new)
        return new

    def commit(self, names: tuple[str, ...], new: dict[str, Tensor], keep: bool | str) -> None:
        """Put prepared parameters in place; ``keep``: True, "cpu" or False for the originals."""
        for key, value in new.items():
            owner, leaf = owner_of(self.base_layer, key)
            if keep and key not in self.originals:
                self.originals[key] = getattr(owner, leaf)
                if keep == "cpu":
                    self.originals[key].data = self.originals[key].data.cpu()
            setattr(owner, leaf, value)
        if not keep:
            self.originals = {}
        self.kept = bool(keep) or not new
        self.merged_adapters = self.present(names)

    def restore(self) -> None:
        """Undo every merge, bit for bit."""
        self.need_originals()
        for key, original in self.originals.items():
            owner, leaf = owner_of(self.base_layer, key)
            now = getattr(owner, leaf)  # the model may have been moved meanwhile
            if original.device != now.device or original.dtype != now.dtype:
                original.data = original.data.to(now.device, now.dtype)
            setattr(owner, leaf, original)
        self.originals, self.merged_adapters = {}, ()

    # -- code that was written for the layer finds the layer

    def __getattr__(self, name: str) -> Any:
        if name in NAMES:
            return NAMES[name](self)
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base_layer" not in modules:
                raise
            return getattr(modules["base_layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # a host owns no tensors: `layer.weight = ...` (tying, resizing) is meant for the layer
        if isinstance(value, Tensor) and "base_layer" in self.__dict__.get("_modules", {}):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)


class Beneath:
    """A layer and the adapters below a given one: all that an adapter sees of the model.

    ``layer(x)`` is the output of what is beneath, ``layer.weights()`` the same as a weight and
    bias; both come in the dtype of the adapter that asks. ``layer.site`` is the geometry,
    ``layer.context`` the values of this call.
    """

    def __init__(
        self,
        host: LayerHost,
        parts: list[Adapter],
        call: Callable[[Tensor], Tensor],
        base: torch.dtype | None,
        want: torch.dtype | None,
    ) -> None:
        self.site, self.host = host.site, host
        self.parts, self.call, self.base, self.want = parts, call, base, want

    @property
    def context(self) -> Any:
        return self.host.switch.current().context

    def rows(self, key: str, n: int) -> Any:
        """A value of this call for each of ``n`` inputs."""
        return each(self.context, key, n, self.site.path)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.parts:
            return cast(self.call(cast(x, self.base)), self.want)
        top = self.parts[-1]
        free = self.base is None or top.native  # under autocast nobody casts but autocast
        want = None if free else top.dtype
        below = Beneath(self.host, self.parts[:-1], self.call, self.base, want)
        if top.skipped():
            return cast(below(x), self.want)
        if not self.site.linear and "merge" not in top.FORBIDS:
            return cast(Adapter.forward(top, x, below), self.want)
        return cast(top(cast(x, want), below), self.want)

    @property
    def bias(self) -> Tensor | None:
        """The bias of what is beneath."""
        b = self.weights()[1] if self.parts else self.site.bias
        return None if b is None else cast(b, self.want)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of what is beneath."""
        w, b = self.site.weight, self.site.bias
        for part in self.parts:
            w, b = part.fold(cast(w, part.dtype), None if b is None else cast(b, part.dtype))
        return cast(w, self.want), None if b is None else cast(b, self.want)


class LayerHost(Host):
    """Stands where a weighted layer stood."""

    def __init__(self, layer: nn.Module, switch: Switch, path: str) -> None:
        super().__init__(layer, switch, path)
        kind = kind_of(layer)
        if kind is None:
            raise TypeError(f"{path} is a {type(layer).__name__}, which is no known weighted layer")
        self.site = kind(self)

    def site_of(self, key: str) -> Site | None:
        return self.site

    def run(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, *rest = args if args else (kwargs.pop("input"),)

        def call(x: Tensor) -> Tensor:
            return self.base(x, *rest, **kwargs)

        fast = choose.run(self, names, x, call) if names else None
        return Beneath(self, self.parts(names), call, *self.dtypes(x))(x) if fast is None else fast

    def mixed(self, rows: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = batch.joint(self, rows, args, kwargs)
        return super().mixed(rows, args, kwargs) if y is None else y

    def alone(self, name: str) -> list[Adapter]:
        """The parts that run for a row of a mixed batch that has this name."""
        return [] if name == BASE else self.parts((name,))

    def lane(self, name: str) -> tuple[str, ...]:
        return batch.TOGETHER if batch.joins(self, name) else super().lane(name)

    def dtypes(self, x: Tensor) -> tuple[torch.dtype | None, torch.dtype | None]:
        """In which dtype the layer below is called, and in which the host answers."""
        free = torch.is_autocast_enabled(x.device.type)
        if isinstance(self.site, Embedding) or not x.is_floating_point():
            out = self.site.raw.dtype if self.site.raw.is_floating_point() else None
        else:
            out = torch.get_autocast_dtype(x.device.type) if free else x.dtype
        return None if free else x.dtype if x.is_floating_point() else out, out

    def base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The untouched layer."""
        if not self.site.linear:
            return self.site.apply(x, self.site.weight)
        if self.originals:
            output: Tensor = functional_call(self.base_layer, self.originals, (x, *args), kwargs)
            return output
        return self.as_it_is(x, *args, **kwargs)

    def as_it_is(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.site.linear:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        weight = self.site.to_matrix(self.base_layer.weight)  # type: ignore[arg-type]
        return self.site.apply(x, weight)  # torch would write renormalised rows into the table

    def folded(self, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        parts = [part.precise() for part in self.parts(names)]
        w, b = Beneath(self, parts, self.base, None, None).weights()
        yield self.site.parameter, self.site.from_matrix(w)
        if b is not None:
            if self.site.bias is None:
                raise MergeError(
                    f"the update of {self.path} has a bias and the layer has none, so merging "
                    "would change the model's "
                    "architecture; keep the adapter unmerged, or train it with lora_bias=False"
                )
            yield "bias", b
