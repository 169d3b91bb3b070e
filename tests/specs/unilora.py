"""Uni-LoRA."""

from graftwork import UniLoraConfig
from specs import Case, Parity

CASES = {
    "unilora": Case(
        lambda: UniLoraConfig(r=2, theta_d_length=10, init_theta_d_bound=0.5),
        main=True,
        identity=False,
    ),
    "unilora_saved": Case(
        lambda: UniLoraConfig(r=3, theta_d_length=500, save_indices=True, init_weights=False),
        identity=False,
    ),
}
TWO = {"r": 4, "theta_d_length": 10, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 3, "theta_d_length": 50, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "UniLoraConfig", TWO),
    Parity("plain", "UniLoraConfig",
           {**TWO, "proj_seed": 5, "bias": "unilora_only", "init_weights": False}, "seed"),
    Parity("plain", "UniLoraConfig", {**TWO, "save_indices": True}, "saved"),
    Parity("plain", "UniLoraConfig", {**TWO, "theta_d_length": 1000}, "long", shake=0.3),
    Parity("llama", "UniLoraConfig", LLAMA, train=True, shake=0.5),
    Parity("gpt2", "UniLoraConfig", {"r": 4, "theta_d_length": 50}, shake=0.5),
]  # fmt: skip
