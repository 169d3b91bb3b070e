"""Full fine-tuning of chosen modules: y = module'(x), a trained copy, as one more method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import TargetConfig
from ..engine import Adapter, Host, Shared
from ..parts.whole import whole
from ..targets.offer import Offer, Target


@dataclass
class FullConfig(TargetConfig, method="FULL", peft=""):
    """Whole modules; by default all of the model, each module with parameters of its own."""

    ensure_weight_tying: bool | None = None  # None: a trained weight acts wherever it is tied

    def places(self, offer: Offer, path: str) -> list[Target]:
        return [Target(path, offer.modules[path])]

    def usual(self, offer: Offer) -> Any:
        tied = {end for path in offer.ends for end in offer.ends[path][1:] or offer.ends[path]}
        first = {min(path, *ends) for path, ends in offer.ends.items() if ends}
        own = [p for p, m in offer.modules.items() if any(True for _ in m.parameters(False))]
        return {p for p in own if p not in tied or p in first}

    def build(self, host: Host, key: str, shared: Shared | None) -> Adapter:
        return whole(host, key)
