"""LoKr."""

from graftwork import LoKrConfig
from specs import Case, Parity

CASES = {
    "lokr": Case(lambda: LoKrConfig(r=1), main=True),
    "lokr_whole": Case(lambda: LoKrConfig(r=8, decompose_factor=2)),
    "lokr_both": Case(lambda: LoKrConfig(r=1, decompose_both=True, decompose_factor=6)),
    "lokr_tucker": Case(lambda: LoKrConfig(r=1, use_effective_conv2d=True, decompose_factor=1)),
    "lokr_lycoris": Case(lambda: LoKrConfig(r=1, init_weights="lycoris")),
    "lokr_random": Case(lambda: LoKrConfig(r=1, init_weights=False), identity=False),
}
PLAIN = {"r": 2, "alpha": 6, "target_modules": ["lin0", "lin1"]}
CONV = {**PLAIN, "target_modules": ["conv1", "conv2"]}
BOTH = {"r": 1, "decompose_both": True, "decompose_factor": 8}
PATTERNS = {"rank_pattern": {"lin0": 1}, "alpha_pattern": {"lin1": 3}}
TUCKER = {"r": 1, "use_effective_conv2d": True, "decompose_factor": 1}
LLAMA = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
PARITY = [
    Parity("plain", "LoKrConfig", PLAIN),
    Parity("plain", "LoKrConfig", {**PLAIN, "r": 8}, "whole"),
    Parity("plain", "LoKrConfig", {**PLAIN, **BOTH}, "both"),
    Parity("plain", "LoKrConfig", {**PLAIN, "decompose_factor": 4}, "factor"),
    Parity("plain", "LoKrConfig", {**PLAIN, "init_weights": "lycoris"}, "lycoris"),
    Parity("plain", "LoKrConfig", {**PLAIN, "init_weights": False}, "random"),
    Parity("plain", "LoKrConfig", {**PLAIN, **PATTERNS}, "patterns"),
    Parity("plain", "LoKrConfig", {**CONV, "r": 1}, "conv"),
    Parity("plain", "LoKrConfig", {**CONV, "r": 8}, "conv-whole"),
    Parity("plain", "LoKrConfig", {**CONV, **TUCKER}, "tucker"),
    Parity("plain", "LoKrConfig", {**CONV, **BOTH}, "conv-both"),
    Parity("llama", "LoKrConfig", LLAMA, train=True),
    Parity("llama", "LoKrConfig", {**LLAMA, **BOTH}, "both", train=True),
]
