"""ModuleHost: stands where any other module stood (attention with its own weights, stacked experts,
heads, norms).

Its parts fold single parameters, which the module's own code then reads through
``functional_call``, or replace the module by a trained copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..fast.rows import expand, tensors_in
from ..fast.tensors import cast, no_autocast
from .adapter import Adapter
from .host import Host
from .site import ParameterSite, Site

PARAM = "param:"  # prefix of the key of a part that sits at one parameter


def part_key(parameter: str) -> str:
    """The key of the part at a parameter; a ModuleDict key holds no dot."""
    return PARAM + parameter.replace(":", "::").replace(".", ":")


class ModuleHost(Host):
    """Stands where a module stood that is not one matrix."""

    def site_of(self, key: str) -> Site | None:
        name = key.removeprefix(PARAM).replace("::", "\0").replace(":", ".").replace("\0", ":")
        return ParameterSite(self, name) if key.startswith(PARAM) else None

    def stack(self, names: tuple[str, ...]) -> tuple[nn.Module | None, list[tuple[str, Adapter]]]:
        """The module that runs instead of the user's, if any, and the parts above it."""
        chosen: nn.Module | None = None
        above: list[tuple[str, Adapter]] = []
        for name in names:
            for key, part in self.parts_of(name):
                if (module := part.instead()) is not None:
                    chosen, above = module, []
                else:
                    above.append((key, part))
        return chosen, above

    def values(
        self, copy: nn.Module | None, above: list[tuple[str, Adapter]], keep_dtype: bool
    ) -> dict[str, Tensor]:
        """The parameters after folding, by name."""
        new: dict[str, Tensor] = {}
        for key, part in above:
            if part.beside or part.skipped():
                continue
            site = self.need_site(key)
            name = site.parameter
            stored = site.raw if copy is None else copy.get_parameter(name)
            stored = new.get(name, stored)
            part = part if keep_dtype else part.precise()
            w, _ = part.fold(cast(site.to_matrix(stored), part.dtype), None)
            w = site.from_matrix(w)
            new[name] = cast(w, site.raw.dtype) if keep_dtype else w
        return new

    def run(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copy, above = self.stack(names)
        with no_autocast(self.base_layer):
            new = self.values(copy, above, keep_dtype=True)
        module = self.base_layer if copy is None else copy
        if copy is None:
            new = {**self.originals, **new}
        beside = [part for _, part in above if part.beside and not part.skipped()]
        context = self.switch.current().context
        inner = [part for part in beside if part.inside]
        beside = [part for part in beside if not part.inside]
        for part in beside:
            args, kwargs = _entered(part, args, kwargs, context)

        def bare() -> Any:
            return functional_call(module, new, args, kwargs) if new else module(*args, **kwargs)

        out = around(bare, module, inner, None)()
        for part in beside:
            out = _added(part, out, args, kwargs)
            part.passed(cast(tensors_in(out)[0], part.dtype), context)
        return out

    def mixed(self, rows: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self.present(tuple(dict.fromkeys(rows)))
        parts = [part for name in names for _, part in self.parts_of(name)]
        if not parts or not all(part.inside for part in parts):
            return super().mixed(rows, args, kwargs)
        first = tensors_in((args, kwargs))[0]  # all rows at once: a cache is that of the batch
        place = {name: i for i, name in enumerate(names)}
        each = [place.get(name, len(names)) for name in expand(rows, len(first), self.path)]
        bare = partial(self.as_it_is, *args, **kwargs)
        choice = torch.tensor(each, device=first.device)
        return around(bare, self.base_layer, parts, choice)()

    def folded(self, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        copy, above = self.stack(names)
        if copy is not None:
            yield from [*copy.named_parameters(), *copy.named_buffers()]
        yield from self.values(copy, above, keep_dtype=False).items()


def around(
    run: Callable[[], Any], module: nn.Module, parts: list[Adapter], choice: Tensor | None
) -> Callable[[], Any]:
    """``run``, which runs a module, with the parts that act inside; those of a kind together."""
    kinds: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        kinds.setdefault(type(part).around, []).append(i)
    for index in kinds.values():
        own, chosen = [parts[i] for i in index], choice
        if choice is not None and len(kinds) > 1:
            table = torch.full((len(parts) + 1,), len(own), device=choice.device)
            table[index] = torch.arange(len(own), device=choice.device)
            chosen = table[choice]
        run = partial(own[0].around, run, module, own, chosen)
    return run


def _entered(part: Adapter, args: Any, kwargs: Any, context: dict[str, Any]) -> tuple[Any, Any]:
    """A module's inputs with what a part adds to the first tensor among them."""
    x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    more = part.ahead(cast(x, part.dtype), context)
    if more is None:
        return args, kwargs
    new = x + cast(more, x.dtype)
    args = tuple(new if v is x else v for v in args)
    return args, {k: new if v is x else v for k, v in kwargs.items()}


def _added(part: Adapter, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An output with what a part adds to it; of several outputs, to the first."""
    if isinstance(out, (tuple, list)):
        return type(out)([_added(part, out[0], args, kwargs), *out[1:]])
    x = tensors_in((args, kwargs))[0]
    more = part.added(cast(x, part.dtype), cast(out, part.dtype))
    return out if more is None else out + cast(more, out.dtype)
