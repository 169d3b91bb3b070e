"""DEFT."""

from graftwork import DeftConfig
from specs import Case, Parity

CASES = {
    "deft": Case(lambda: DeftConfig(r=2, alpha=3), main=True),
    "deft_qr": Case(lambda: DeftConfig(r=3, decomposition_method="qr")),
    "deft_para": Case(lambda: DeftConfig(r=2, para=True), identity=False),
    "deft_random": Case(lambda: DeftConfig(r=2, init_weights=False), identity=False),
}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "DeftConfig", PLAIN),
    Parity("plain", "DeftConfig", {**PLAIN, "alpha": 6, "bias": "deft_only"}, "alpha"),
    Parity("plain", "DeftConfig", {**PLAIN, "r": 20, "decomposition_method": "qr"}, "qr"),
    Parity("plain", "DeftConfig", {**PLAIN, "para": True}, "para"),
    Parity("plain", "DeftConfig", {**PLAIN, "init_weights": False, "init_scale": 3.0}, "random"),
    Parity("llama", "DeftConfig", {**LLAMA, "alpha": 6}, train=True),
    Parity("llama", "DeftConfig", {**LLAMA, "decomposition_method": "qr"}, "qr", train=True),
    Parity("llama", "DeftConfig", {**LLAMA, "para": True}, "para", train=True),
    Parity("gpt2", "DeftConfig", {"r": 4, "fan_in_fan_out": True}),
    Parity("gpt2", "DeftConfig", {"r": 4, "decomposition_method": "qr"}, "qr"),
]
