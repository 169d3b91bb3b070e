"""PEANuT: a network over the weight."""

from graftwork import PeanutConfig
from specs import Case, Parity

CASES = {
    "peanut": Case(lambda: PeanutConfig(r=3, depth=1), main=True),
    "peanut_flat": Case(lambda: PeanutConfig(r=3, act_fn="gelu", scaling=2.0)),
    "peanut_deep": Case(lambda: PeanutConfig(r=2, depth=3, act_fn="quick_gelu")),
    "peanut_random": Case(lambda: PeanutConfig(r=3, init_weights=False), identity=False),
}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "PeanutConfig", PLAIN),
    Parity("plain", "PeanutConfig", {**PLAIN, "depth": 1, "scaling": 3.0}, "one", shake=0.3),
    Parity("plain", "PeanutConfig", {**PLAIN, "depth": 3, "init_weights": False}, "three"),
    *(
        Parity("plain", "PeanutConfig", {**PLAIN, "depth": 2, "act_fn": f}, f, shake=0.3)
        for f in ("gelu", "silu", "swish", "tanh", "sigmoid", "linear", "gelu_new", "leaky_relu")
    ),
    Parity("llama", "PeanutConfig", LLAMA, train=True),
    Parity("llama", "PeanutConfig", {**LLAMA, "depth": 2, "act_fn": "tanh"}, "deep", train=True),
]
