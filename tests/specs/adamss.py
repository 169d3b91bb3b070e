"""AdaMSS: a small update for each cluster of outputs."""

from graftwork import AdamssConfig
from specs import Case, Parity

CASES = {
    "adamss": Case(lambda: AdamssConfig(r=4, num_subspaces=2), main=True),
    "adamss_dynamic": Case(
        lambda: AdamssConfig(num_subspaces=3, subspace_rank=3, use_dynamic_rank=True)
    ),
    "adamss_random": Case(
        lambda: AdamssConfig(r=4, num_subspaces=2, init_weights=None), identity=False
    ),
}
PLAIN = {"r": 8, "num_subspaces": 2, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 10, "num_subspaces": 3, "subspace_rank": 2}
PARITY = [
    Parity("plain", "AdamssConfig", PLAIN),
    Parity("plain", "AdamssConfig", {**PLAIN, "r": 100, "random_seed": 3}, "seed"),
    Parity("plain", "AdamssConfig", {**PLAIN, "init_weights": None}, "random"),
    Parity("plain", "AdamssConfig",
           {**PLAIN, "subspace_rank": 5, "use_dynamic_rank": True, "svd_threshold": 0.3},
           "dynamic"),
    Parity("llama", "AdamssConfig", {**LLAMA, "target_modules": ["q_proj", "down_proj"]},
           train=True),
    Parity("llama", "AdamssConfig", {**LLAMA, "use_asa": True}, "default"),
]  # fmt: skip
