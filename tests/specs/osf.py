"""OSF: the smaller singular directions, trained."""

from graftwork import OSFConfig
from specs import Case, Parity

CASES = {
    "osf": Case(OSFConfig, main=True),
    "osf_three": Case(lambda: OSFConfig(effective_rank=3)),
    "osf_random": Case(lambda: OSFConfig(init_weights=False), identity=False),
}
PLAIN = {"target_modules": ["lin0", "lin1"]}
LLAMA = {"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]}
PARITY = [
    Parity("plain", "OSFConfig", PLAIN),
    Parity("plain", "OSFConfig", {**PLAIN, "effective_rank": 5}, "number"),
    Parity("plain", "OSFConfig",
           {**PLAIN, "effective_rank": 0.8, "rank_pattern": {"n0": 3, "n1": 0.3}}, "patterns"),
    Parity("plain", "OSFConfig", {**PLAIN, "init_weights": False}, "random"),
    Parity("llama", "OSFConfig", LLAMA, train=True),
    Parity("llama", "OSFConfig", {"effective_rank": 0.9}, "default", train=True),
]  # fmt: skip
