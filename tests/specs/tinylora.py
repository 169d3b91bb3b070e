"""TinyLoRA."""

from graftwork import TinyLoraConfig
from specs import Case, Parity

CASES = {
    "tinylora": Case(lambda: TinyLoraConfig(r=2, u=5), main=True),
    "tinylora_tied": Case(
        lambda: TinyLoraConfig(
            r=2, u=5, weight_tying=1, save_projection=False, init_weights="uniform"
        ),
        identity=False,
    ),
}
TWO = {"r": 2, "u": 8, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 4, "u": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "weight_tying": 0.5}
PARITY = [
    Parity("plain", "TinyLoraConfig", TWO, shake=0.3),
    Parity("plain", "TinyLoraConfig",
           {**TWO, "save_projection": False, "projection_seed": 5, "bias": "tinylora_only"},
           "drawn", shake=0.3),
    Parity("plain", "TinyLoraConfig", {**TWO, "r": 20, "weight_tying": 1.0}, "tied"),
    Parity("plain", "TinyLoraConfig",
           {**TWO, "target_modules": ["emb", "lin0"], "init_weights": "uniform",
            "init_v_bound": 0.5}, "embedding"),
    Parity("llama", "TinyLoraConfig", LLAMA, train=True, shake=0.3),
    Parity("llama", "TinyLoraConfig",
           {**LLAMA, "weight_tying": 0.3, "save_projection": False}, "some", shake=0.3),
    Parity("gpt2", "TinyLoraConfig", {"r": 2, "u": 8}, shake=0.3),
]  # fmt: skip
