"""Super-Tuning, and Supra with its LoRA."""

from graftwork import SupertuningConfig
from specs import Case, Parity

CASES = {
    "supertuning": Case(lambda: SupertuningConfig(sparsity=0.8), main=True),
    "supertuning_smallest": Case(
        lambda: SupertuningConfig(sparsity=0.8, select_top=False, save_precomputed_indices=False)
    ),
    "supra": Case(lambda: SupertuningConfig(sparsity=0.8, r=2), main=True),
    "supra_random": Case(
        lambda: SupertuningConfig(sparsity=0.8, r=2, lora_alpha=3, init_weights=False),
        identity=False,
    ),
}
PLAIN = {"sparsity": 0.9, "target_modules": ["lin0", "lin1"]}
LLAMA = {"sparsity": 0.9, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SMALLEST = {**PLAIN, "select_top": False}
DERIVED = {**PLAIN, "save_precomputed_indices": False, "r": 2}
PARITY = [
    Parity("plain", "SupertuningConfig", PLAIN),
    Parity("plain", "SupertuningConfig", {**SMALLEST, "init_weights": False}, "smallest"),
    Parity("plain", "SupertuningConfig", DERIVED, "derived"),
    Parity("plain", "SupertuningConfig", {**PLAIN, "r": 2, "lora_alpha": 3}, "supra"),
    Parity("llama", "SupertuningConfig", LLAMA, train=True),
    Parity("llama", "SupertuningConfig", {**LLAMA, "r": 3}, "supra", train=True),
]
