"""BEFT: biases alone."""

from graftwork import BeftConfig
from specs import Case, Parity

# a parameter that its module's own code reads is no layer, so it has no place for a bias
CASES = {
    "beft": Case(BeftConfig, main=True, lacks="fold"),
    "beft_random": Case(lambda: BeftConfig(init_weights=False), identity=False, lacks="fold"),
}
PARITY = [
    Parity("plain", "BeftConfig", {"target_modules": ["lin0", "lin1"]}),
    Parity("plain", "BeftConfig", {"target_modules": ["lin0"], "init_weights": False}, "random"),
    Parity("llama", "BeftConfig", {"target_modules": ["v_proj", "down_proj"]}, train=True),
    Parity("bert", "BeftConfig", {"task_type": "SEQ_CLS"}, "default"),
]
