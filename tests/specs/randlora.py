"""RandLoRA."""

from graftwork import RandLoraConfig
from specs import Case, Parity

CASES = {
    "randlora": Case(lambda: RandLoraConfig(r=2, randlora_alpha=4), main=True),
    "randlora_sparse": Case(
        lambda: RandLoraConfig(
            r=4, randlora_alpha=4, sparse=True, init_weights=False, save_projection=False
        ),
        identity=False,
    ),
}
TWO = {"r": 4, "randlora_alpha": 8, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 6, "randlora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "RandLoraConfig", TWO),
    Parity("plain", "RandLoraConfig", {**TWO, "r": 5}, "uneven"),
    Parity("plain", "RandLoraConfig", {**TWO, "sparse": True}, "sparse"),
    Parity("plain", "RandLoraConfig", {**TWO, "very_sparse": True}, "very_sparse"),
    Parity("plain", "RandLoraConfig", {**TWO, "init_weights": False}, "random"),
    Parity("plain", "RandLoraConfig",
           {**TWO, "save_projection": False, "projection_prng_key": 5, "bias": "randlora_only"},
           "drawn"),
    Parity("plain", "RandLoraConfig", {**TWO, "save_projection": False, "sparse": True},
           "drawn_sparse"),
    Parity("llama", "RandLoraConfig", LLAMA, train=True),
    Parity("gpt2", "RandLoraConfig", {"r": 4, "randlora_alpha": 8}),
]  # fmt: skip
