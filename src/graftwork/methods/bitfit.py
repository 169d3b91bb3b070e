"""BitFit (arXiv 2106.10199): b' = b + d, the biases alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import TargetConfig
from ..engine import Adapter, Host, Shared
from ..engine.site import ParameterSite, kind_of
from ..errors import TargetError
from ..parts.whole import Bias, Whole
from ..targets.offer import Offer, Target, leaf


@dataclass
class BitFitConfig(TargetConfig, method="BITFIT", peft=""):
    """The biases of the layers and norms that ``target_modules`` names; by default all."""

    def places(self, offer: Offer, path: str) -> list[Target]:
        module = offer.modules[path]
        own = [n for n, p in module._parameters.items() if p is not None and n.endswith("bias")]
        at = offer.targets(path)
        if at and at[0].path != path:  # a layer inside an attention is that attention's
            return [Target(at[0].path, at[0].module, f"{leaf(path)}.{name}") for name in own]
        whole = kind_of(module) is not None
        found = [Target(path, module, None if whole else name) for name in own]
        if at and not whole:
            for child, _ in module.named_children():
                found += self.places(offer, f"{path}.{child}")
        return found

    def usual(self, offer: Offer) -> Any:
        biased = {path for path in offer.modules if self.places(offer, path)}
        if not biased:
            raise TargetError(
                f"{type(offer.model).__name__} has no bias to train: use LoRA, or IA3"
            )
        return biased

    def build(self, host: Host, key: str, shared: Shared | None) -> Adapter:
        site = host.need_site(key)
        return Whole(site) if isinstance(site, ParameterSite) else Bias(site)
