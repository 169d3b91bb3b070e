"""The methods over which the laws are tested, small enough for layers of 6 to 12 channels.

A new method is one more line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graftwork import AdaLoraConfig, IA3Config, LoraConfig, TrainableTokensConfig
from graftwork.testing.bench import shake as shake
from graftwork.testing.layers import KINDS


@dataclass(frozen=True)
class Case:
    """One method with its options.

    Args:
        config: builds the config, without targets.
        identity: whether it starts as the identity.
        main: whether it stands for its method where all pairs of methods are tested.
        call: arguments of every call, for four rows.
        needs: tags that a kind of layer must have.
        lacks: tags that it must not have.
        only: kinds to which it is limited; a key of KINDS.
        but: kinds at which it has no meaning.
    """

    config: Callable[..., Any]
    identity: bool = True
    main: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    lacks: str = ""
    but: str = ""

    def applies(self, kind: str) -> bool:
        """Whether it has a meaning at a kind of layer."""
        tags = KINDS[kind].tags
        wanted, barred = set(self.needs.split()), set(self.lacks.split())
        return wanted <= tags and not barred & tags and kind not in self.but.split()


def lora(**options: Any) -> Callable[..., Any]:
    return lambda: LoraConfig(**{"r": 2, "lora_alpha": 3, **options})


SVD = {"lacks": "ids depthwise"}  # starts from the weight's own directions

METHODS: dict[str, Case] = {
    "lora": Case(lora(), main=True),
    "lora_random": Case(lora(init_lora_weights=False), identity=False),
    "lora_gaussian": Case(lora(init_lora_weights="gaussian")),
    "lora_orthogonal": Case(lora(init_lora_weights="orthogonal")),
    "lora_pissa": Case(lora(init_lora_weights="pissa"), **SVD),
    "lora_fast_pissa": Case(lora(init_lora_weights="pissa_niter_4"), **SVD),
    "lora_olora": Case(lora(init_lora_weights="olora"), **SVD),
    "lora_rs": Case(lora(use_rslora=True)),
    "lora_bias": Case(lora(lora_bias=True), lacks="ids fold"),
    "lora_trains_bias": Case(lora(bias="lora_only"), needs="bias"),
    "dora": Case(lora(use_dora=True), main=True),
    "dora_pissa": Case(lora(use_dora=True, init_lora_weights="pissa"), **SVD),
    "adalora": Case(lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=10), main=True),
    "ia3": Case(IA3Config, main=True),
    "ia3_feedforward": Case(lambda: IA3Config(feedforward_modules={"l"})),
    "tokens": Case(lambda: TrainableTokensConfig(token_indices=[1, 3]), needs="tokens", main=True),
}
CASES = [(m, k) for m, case in METHODS.items() for k in KINDS if case.applies(k)]
MAIN = [m for m, case in METHODS.items() if case.main]
