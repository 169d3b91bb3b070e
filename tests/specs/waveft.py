"""WaveFT."""

from graftwork import WaveFTConfig
from specs import Case, Parity

CASES = {
    "waveft": Case(lambda: WaveFTConfig(n_frequency=20), main=True),
    "waveft_coif1": Case(lambda: WaveFTConfig(n_frequency=20, wavelet_family="coif1")),
    "waveft_sparse": Case(lambda: WaveFTConfig(n_frequency=20, use_idwt=False)),
    "waveft_proportional": Case(
        lambda: WaveFTConfig(n_frequency=20, proportional_parameters=True, init_weights=False),
        identity=False,
    ),
}
PLAIN = {"n_frequency": 40, "target_modules": ["lin0", "lin1", "head"]}  # head has 5 outputs
LLAMA = {"n_frequency": 50, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# PEFT 0.21.2 has no numbers for the other families, and wrong ones for coif4 and coif5
FAMILIES = [*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)),
            "coif1", "coif2", "coif3"]  # fmt: skip
PARITY = [
    *(Parity("plain", "WaveFTConfig", {**PLAIN, "wavelet_family": f}, f) for f in FAMILIES),
    Parity("plain", "WaveFTConfig", {**PLAIN, "n_frequency_pattern": {"lin0": 7}}, "pattern"),
    Parity("plain", "WaveFTConfig", {**PLAIN, "proportional_parameters": True}, "proportional"),
    Parity("plain", "WaveFTConfig", {**PLAIN, "use_idwt": False, "scaling": 3.0}, "sparse"),
    Parity("plain", "WaveFTConfig",
           {**PLAIN, "random_loc_seed": 3, "init_weights": False, "bias": "waveft_only"}, "seed"),
    Parity("llama", "WaveFTConfig", {**LLAMA, "scaling": 4.0}, train=True),
    Parity("llama", "WaveFTConfig", {**LLAMA, "wavelet_family": "sym4", "scaling": 4.0}, "sym4",
           train=True),
    Parity("gpt2", "WaveFTConfig", {"n_frequency": 40}),
    Parity("gpt2", "WaveFTConfig",
           {"n_frequency": 40, "target_modules": ["c_attn", "c_fc"], "wavelet_family": "db3",
            "proportional_parameters": True}, "attn"),
]  # fmt: skip
