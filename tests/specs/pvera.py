"""PVeRA."""

from graftwork import PveraConfig
from specs import Case, Parity

CASES = {
    "pvera": Case(lambda: PveraConfig(r=3), main=True),
    "pvera_random": Case(
        lambda: PveraConfig(r=3, init_weights=False, save_projection=False, generator_seed=1),
        identity=False,
    ),
}  # fmt: skip
TWO = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "generator_seed": 3}
PARITY = [
    Parity("plain", "PveraConfig", TWO),
    Parity("plain", "PveraConfig",
           {**TWO, "save_projection": False, "projection_prng_key": 5, "bias": "pvera_only"},
           "drawn"),
    Parity("plain", "PveraConfig", {**TWO, "init_weights": False, "d_initial": 0.3}, "random"),
    Parity("plain", "PveraConfig",
           {**TWO, "sample_at_inference": True, "generator_seed": 7}, "sampled"),
    Parity("llama", "PveraConfig", LLAMA, train=True),
    Parity("gpt2", "PveraConfig", {"r": 4}),
]  # fmt: skip
