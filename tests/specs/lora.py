"""LoRA, DoRA, AdaLoRA, IA3, trainable tokens; their parity is in tests/parity/test_crossing.py."""

from collections.abc import Callable
from typing import Any

from graftwork import AdaLoraConfig, IA3Config, LoraConfig, TrainableTokensConfig
from specs import Case


def lora(**options: Any) -> Callable[..., Any]:
    return lambda: LoraConfig(**{"r": 2, "lora_alpha": 3, **options})


SVD = {"lacks": "ids depthwise"}  # starts from the weight's own directions

CASES: dict[str, Case] = {
    "lora": Case(lora(), main=True),
    "lora_random": Case(lora(init_lora_weights=False), identity=False),
    "lora_gaussian": Case(lora(init_lora_weights="gaussian")),
    "lora_orthogonal": Case(lora(init_lora_weights="orthogonal"), row="orthogonal"),
    "lora_pissa": Case(lora(init_lora_weights="pissa"), row="PiSSA", **SVD),
    "lora_fast_pissa": Case(lora(init_lora_weights="pissa_niter_4"), **SVD),
    "lora_olora": Case(lora(init_lora_weights="olora"), row="OLoRA", **SVD),
    "lora_loftq": Case(lora(init_lora_weights="loftq"), identity=False, row="LoftQ", lacks="ids"),
    "lora_rs": Case(lora(use_rslora=True), row="rsLoRA"),
    "lora_bias": Case(lora(lora_bias=True), lacks="ids fold"),
    "lora_trains_bias": Case(lora(bias="lora_only"), needs="bias"),
    "dora": Case(lora(use_dora=True), main=True, row="DoRA"),
    "dora_pissa": Case(lora(use_dora=True, init_lora_weights="pissa"), **SVD),
    "adalora": Case(lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=10), main=True),
    "ia3": Case(IA3Config, main=True),
    "ia3_feedforward": Case(lambda: IA3Config(feedforward_modules={"l"})),
    "tokens": Case(
        lambda: TrainableTokensConfig(token_indices=[1, 3]),
        needs="tokens",
        main=True,
        other=lambda: TrainableTokensConfig(token_indices=[0, 5]),
    ),
}
