"""Which tensor of a model's files is which parameter, and what adapters make of it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.host import Host, LayerHost
from ..engine.module import ModuleHost
from ..engine.tree import hosts
from ..errors import MergeError
from .shards import Shard


class Plan:
    """A model whose parameters are views of its files.

    Args:
        model: the model, without memory.
        shards: the files.
    """

    def __init__(self, model: Any, shards: list[Shard]) -> None:
        self.model = model
        self.where = {key: shard for shard in shards for key in shard.entries}
        self.names: dict[str, list[str]] = {}  # a tensor of the files -> what it is here
        self.values: dict[str, Tensor] = {}  # by name here, as the files have them
        self.lacking: list[str] = []
        prefix = f"{getattr(model, 'base_model_prefix', '') or '-'}."
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        for name, tensor in tensors:
            forms = (name, name.removeprefix(prefix), prefix + name)
            key = next((form for form in forms if form in self.where), None)
            if key is None:
                self.lacking += [name] if isinstance(tensor, nn.Parameter) else []
                continue
            self.names.setdefault(key, []).append(name)
            if isinstance(tensor, nn.Parameter):
                self._assign(name, tensor, self.where[key].view(key))
        self._tie()
        self.changed: dict[str, tuple[Host, str]] = {}  # a name here -> where it is computed
        self.ready: dict[int, dict[str, Tensor]] = {}

    def _assign(self, name: str, old: Tensor, value: Tensor) -> None:
        if value.shape != old.shape:  # the adapter brings it, in another size
            value = torch.full(old.shape, torch.nan, dtype=value.dtype)
        self._put(name, nn.Parameter(value, requires_grad=False))

    def _put(self, name: str, parameter: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[leaf] = parameter
        self.values[name] = parameter

    def _tie(self) -> None:
        keys = {name: key for key, names in self.names.items() for name in names}
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, source in tied.items():
            if name in self.lacking and source in self.values:
                self.lacking.remove(name)
                self.names[keys[source]].append(name)
                self._put(name, self.values[source])

    def adapt(self, names: tuple[str, ...]) -> None:
        """Find out what these adapters change, now that they are in the model.

        Raises:
            MergeError: a layer's weights are not in the files under its name, or an adapter is no
                weight.
        """
        self.active, self.hosts = names, hosts(self.model)
        for path, host in sorted(self.hosts.items(), key=lambda item: len(item[0])):
            every = [part for name in host.present(names) for _, part in host.parts_of(name)]
            if any("merge" in part.FORBIDS for part in every):
                host.prepare(names)  # says why not
            if host.present(names) and not leaves(host, names):
                raise MergeError(
                    f"the adapter at {path} changes no weight there, so merging would lose it; "
                    "run it unmerged"
                )
            for leaf, whole in leaves(host, names).items():
                name = f"{path}.{leaf}" if path else leaf
                if name in self.lacking and not whole:
                    raise MergeError(
                        f"the files of the base model have no tensor {name}: transformers makes it "
                        "of others on loading. Merge with --in-memory"
                    )
                self.changed[name] = host, leaf
        if not self.changed:
            raise MergeError(f"{list(names)} change no weight of this model; nothing to merge")

    def need_all(self, sites: Collection[str]) -> None:
        """Stop where a layer was left out.

        Raises:
            MergeError: it is not among the layers that were merged.
        """
        every = dict.fromkeys(host.path for host, _ in self.changed.values())
        if lost := [path for path in every if path not in sites]:
            raise MergeError(
                f"merging {list(self.active)} left out {len(lost)} of {len(every)} layers, "
                f"{lost[0]} among them, so the result would be partly the base model; merge with "
                "--in-memory"
            )

    def value(self, name: str) -> Tensor:
        """A tensor with the adapters in it."""
        if name in self.changed:
            host, leaf = self.changed[name]
            if id(host) not in self.ready:
                self.ready[id(host)] = found = dict(host.prepare(self.active))
                if more := found.keys() - leaves(host, self.active).keys():
                    raise MergeError(
                        f"the adapter changes {sorted(more)} of {host.path}, which its method does "
                        "not say; merge with --in-memory"
                    )
            if leaf in self.ready[id(host)]:
                return self.ready[id(host)][leaf]
        return self.values[name]

    def written(self, name: str) -> None:
        """A tensor is done with: its layer's values are dropped with the last of them."""
        if (place := self.changed.get(name)) and (values := self.ready.get(id(place[0]))):
            values.pop(place[1], None)
            if not values:
                del self.ready[id(place[0])]


def leaves(host: Host, names: tuple[str, ...]) -> dict[str, bool]:
    """Which tensors of a host's layer adapters may change; True: by others in their place."""
    here = host.present(names)
    if not here:
        return {}
    if isinstance(host, LayerHost):
        whole = any(part.replaces for part in host.parts(here))
        bias = {"bias": whole} if host.site.bias is not None else {}
        return {host.site.parameter: whole, **bias}
    assert isinstance(host, ModuleHost)
    module, above = host.stack(here)
    own: dict[str, bool] = {}
    if module is not None:
        own = {name: True for name in copy.copy(module).state_dict()}
    for key, part in above:
        if not part.beside:
            own.setdefault(host.need_site(key).parameter, False)
    return own
