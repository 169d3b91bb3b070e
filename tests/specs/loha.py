"""LoHa."""

from graftwork import LoHaConfig
from specs import Case, Parity

CASES = {
    "loha": Case(lambda: LoHaConfig(r=2), main=True),
    "loha_tucker": Case(lambda: LoHaConfig(r=2, use_effective_conv2d=True)),
    "loha_random": Case(lambda: LoHaConfig(r=2, init_weights=False), identity=False),
}
PLAIN = {"r": 4, "alpha": 6, "target_modules": ["lin0", "lin1"]}
PARITY = [
    Parity("plain", "LoHaConfig", PLAIN),
    Parity("plain", "LoHaConfig", {"r": 4, "target_modules": ["conv1", "conv2"]}, "conv"),
    Parity("plain", "LoHaConfig",
           {"r": 4, "target_modules": ["conv2"], "use_effective_conv2d": True}, "tucker"),
    Parity("plain", "LoHaConfig",
           {**PLAIN, "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin1": 3}}, "patterns"),
    Parity("llama", "LoHaConfig", {"r": 3, "target_modules": ["q_proj", "down_proj"]}, train=True),
]  # fmt: skip
