"""FRoD: coordinates in a basis that layers share."""

from graftwork import FrodConfig
from specs import Case, Parity

CASES = {
    "frod": Case(lambda: FrodConfig(sparse_rate=0.1), main=True),
    "frod_diagonal": Case(lambda: FrodConfig(sparse_rate=0)),
    "frod_unsaved": Case(lambda: FrodConfig(save_projection=False)),
    "frod_random": Case(lambda: FrodConfig(init_weights=False), identity=False),
}
PLAIN = {"target_modules": ["lin0", "lin1"], "progressbar": False}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "progressbar": False}
PARITY = [
    Parity("plain", "FrodConfig", PLAIN),
    Parity("plain", "FrodConfig", {**PLAIN, "init_weights": False, "bias": "frod_only"}, "random"),
    Parity("plain", "FrodConfig", {**PLAIN, "sparse_rate": 0.2, "projection_prng_key": 4,
                                   "save_projection": False}, "unsaved"),
    Parity("llama", "FrodConfig", LLAMA, train=True, shake=0.02),
    Parity("llama", "FrodConfig",
           {**LLAMA, "sparse_rate": 0.05, "regularization_alpha": 0.1, "save_projection": False},
           "unsaved", train=True, shake=0.02),
    Parity("gpt2", "FrodConfig", {"progressbar": False}, shake=0.02),
    Parity("bert", "FrodConfig", {"task_type": "SEQ_CLS", "progressbar": False,
                                  "target_modules": ["query", "dense"]}, "categories"),
]  # fmt: skip
