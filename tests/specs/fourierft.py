"""FourierFT."""

from graftwork import FourierFTConfig
from specs import Case, Parity

CASES = {
    "fourierft": Case(
        lambda: FourierFTConfig(n_frequency=20, scaling=8.0), identity=False, main=True
    ),
    "fourierft_zero": Case(lambda: FourierFTConfig(n_frequency=20, scaling=8.0, init_weights=True)),
}
PLAIN = {"n_frequency": 40, "scaling": 10.0, "target_modules": ["lin0", "lin1"]}
LLAMA = {"n_frequency": 50, "scaling": 20.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "FourierFTConfig", PLAIN),
    Parity("plain", "FourierFTConfig", {**PLAIN, "n_frequency_pattern": {"lin0": 7}}, "pattern"),
    Parity("plain", "FourierFTConfig",
           {**PLAIN, "random_loc_seed": 3, "init_weights": True, "bias": "fourierft_only"}, "seed"),
    Parity("plain", "FourierFTConfig", {**PLAIN, "target_modules": ["lin0", "head"]}, "odd"),
    Parity("llama", "FourierFTConfig", {**LLAMA, "init_weights": True}, train=True),
    Parity("llama", "FourierFTConfig", {"n_frequency": 9, "layers_to_transform": [1]}, "block"),
    Parity("gpt2", "FourierFTConfig", {"n_frequency": 40}),
    Parity("gpt2", "FourierFTConfig", {"n_frequency": 40, "target_modules": ["c_attn"]}, "attn"),
]  # fmt: skip
