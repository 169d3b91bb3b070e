"""VeRA."""

from graftwork import VeraConfig
from specs import Case, Parity

CASES = {"vera": Case(lambda: VeraConfig(r=3), main=True)}
LLAMA = {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "VeraConfig", {"r": 4, "target_modules": ["lin0", "lin1"]}),
    Parity("plain", "VeraConfig",
           {"r": 4, "target_modules": ["lin0", "lin1"], "save_projection": False,
            "projection_prng_key": 5, "bias": "vera_only"}, "drawn"),
    Parity("llama", "VeraConfig", LLAMA, train=True),
    Parity("gpt2", "VeraConfig", {"r": 4}),
]  # fmt: skip
