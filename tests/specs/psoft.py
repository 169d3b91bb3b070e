"""PSOFT: rotations of a weight's principal subspace."""

from graftwork import PsoftConfig
from specs import Case, Parity

SUM = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "cayley_neumann_eps": 0.2}
CASES = {
    "psoft": Case(lambda: PsoftConfig(r=3), main=True),
    "psoft_sum": Case(lambda: PsoftConfig(r=3, **SUM)),
    "psoft_free": Case(
        lambda: PsoftConfig(
            r=3, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False, ab_svd_init="pissa_init"
        )
    ),
    "psoft_lowrank": Case(
        lambda: PsoftConfig(r=3, psoft_svd="lowrank", init_weights=False), identity=False
    ),
}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
WITHOUT = {"psoft_mag_a": False, "psoft_mag_b": False}
PARITY = [
    Parity("plain", "PsoftConfig", PLAIN),
    Parity("plain", "PsoftConfig", {**PLAIN, "psoft_alpha": 7, "init_weights": False}, "alpha"),
    Parity("plain", "PsoftConfig",
           {**PLAIN, "psoft_alpha": 7, "ab_svd_init": "pissa_init", "psoft_mag_b": False}, "pissa"),
    Parity("plain", "PsoftConfig", {**PLAIN, "psoft_orth": False, "psoft_mag_a": False}, "free"),
    Parity("plain", "PsoftConfig", {**PLAIN, **WITHOUT}, "rotation", shake=0.3),
    Parity("plain", "PsoftConfig",
           {**PLAIN, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3, "random_seed": 5},
           "lowrank"),
    *(Parity("plain", "PsoftConfig",
             {**PLAIN, **SUM, "num_cayley_neumann_terms": n}, f"sum{n}", shake=0.3)
      for n in (2, 3, 4, 5, 7)),
    Parity("plain", "PsoftConfig",
           {**PLAIN, **SUM, "cayley_neumann_eps": None}, "sum_free", shake=0.3),
    Parity("llama", "PsoftConfig", LLAMA, train=True),
    Parity("llama", "PsoftConfig", {**LLAMA, **SUM}, "sum", train=True),
    Parity("llama", "PsoftConfig", {**LLAMA, "psoft_orth": False}, "free", train=True),
    Parity("llama", "PsoftConfig",
           {**LLAMA, "ab_svd_init": "pissa_init", "psoft_svd": "lowrank"}, "pissa", train=True),
]  # fmt: skip
