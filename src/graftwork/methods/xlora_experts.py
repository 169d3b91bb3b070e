"""The experts of X-LoRA: LoRAs in folders of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import PeftConfig
from ..engine import Adapter, Site
from ..engine.tree import hosts, parameters
from ..errors import FileError, TargetError
from ..files import codec, folder
from ..files.hub import Source
from ..targets.match import Match

if TYPE_CHECKING:
    from ..targets.offer import Offer
    from .lora_config import LoraConfig
    from .xlora import XLoraConfig

BESIDE = "modules_to_save trainable_token_indices target_parameters use_dora".split()


@dataclass
class Expert:
    """One LoRA on disk: its config, its tensors, and the layers that it adapts."""

    source: Source
    config: LoraConfig
    tensors: dict[str, Tensor]
    paths: frozenset[str]

    def at(self, site: Site, trains: bool) -> Adapter:
        """The LoRA at one layer, with its values."""
        config = self.config.at(site.path)
        part = config.adapter()(config, site)
        part.derive(site)
        part.prefix = f"{codec.PREFIX}{site.path}."
        self.give(part)
        part.requires_grad_(trains)
        for name, p in list(part.named_parameters()) if not trains else ():
            delattr(part, name)
            part.register_buffer(name, p.data)  # nothing that unfreezes an adapter finds it
        return part

    def give(self, part: Adapter) -> None:
        """Give a part its values, once."""
        wanted = part.expects(self.config)
        mine = {key: self.tensors.pop(part.prefix + key, torch.empty(0)) for key in wanted}
        for key, shape in wanted.items():
            if tuple(mine[key].shape) != shape:
                raise FileError(
                    f"{self.source} does not fit this model: {part.prefix}{key} is not there in "
                    f"the shape {shape}"
                )
        with torch.no_grad():
            part.take(mine, self.config)


def read(config: XLoraConfig, offer: Offer) -> list[Expert]:
    """The experts, in their order."""
    if not config.adapters:
        raise ValueError(
            "X-LoRA mixes trained LoRAs; name them: XLoraConfig(adapters={'math': 'folder', ...})"
        )
    places = {name: (where, "") for name, where in config.adapters.items()} | config.nested
    return [_read(Source(*places[name]), offer) for name in config.adapters]


def _read(source: Source, offer: Offer) -> Expert:
    config: Any = folder.config_of(source)
    if config.method != "LORA" or config.bias != "none" or any(getattr(config, n) for n in BESIDE):
        raise TargetError(
            f"{source} is no plain LoRA; X-LoRA mixes low-rank updates and nothing else, such as "
            f"{', '.join(BESIDE)} or bias"
        )
    config.prepare(offer)
    paths = frozenset(target.path for target in Match(offer, config).targets())
    tensors, base = folder.read_tensors(source), dict(parameters(offer.model))
    fronts = tuple(f"{codec.PREFIX}{path}.lora_" for path in paths)
    for name in [name for name in tensors if not name.startswith(fronts)]:
        own = base.get(name.removeprefix(codec.PREFIX).replace(".base_layer.", "."))
        if own is None or not torch.equal(own.cpu(), tensors.pop(name).to(own.dtype)):
            raise FileError(f"{source} holds {name}, which is no part of a LoRA here")
    return Expert(source, config, tensors, paths)


def _parts(model: Any, name: str) -> list[tuple[int, Adapter]]:
    mixtures: list[Any] = [p for h in hosts(model).values() for _, p in h.parts_of(name)]
    return [found for mixture in mixtures for found in mixture.parts()]


def folders(config: XLoraConfig, model: Any, name: str) -> dict[str, tuple[PeftConfig, Any]]:
    """What is to be saved of each expert: its config, and its tensors as they are now."""
    found: list[dict[str, Tensor]] = [{} for _ in config.experts]
    for i, part in _parts(model, name):
        found[i].update({part.prefix + k: t.detach() for k, t in part.file_tensors().items()})
    configs = [expert.config for expert in config.experts]
    return dict(zip(config.adapters, zip(configs, found, strict=True), strict=True))


def fill(config: XLoraConfig, model: Any, name: str) -> None:
    """Give the experts of a mixture that is in place the values of another's files."""
    from ..targets.offer import Offer

    experts = read(config, Offer(model))
    for i, part in _parts(model, name):
        experts[i].give(part)
