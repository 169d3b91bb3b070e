"""DeLoRA."""

from graftwork import DeloraConfig
from specs import Case, Parity

CASES = {
    "delora": Case(lambda: DeloraConfig(r=3), main=True),
    "delora_random": Case(lambda: DeloraConfig(r=2, init_weights=False), identity=False),
}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "delora_lambda": 2}
PATTERNS = {"rank_pattern": {"lin0": 2}, "lambda_pattern": {"lin1": 3}}
PARITY = [
    Parity("plain", "DeloraConfig", PLAIN),
    Parity("plain", "DeloraConfig", {**PLAIN, "init_weights": False}, "random"),
    Parity("plain", "DeloraConfig", {**PLAIN, **PATTERNS}, "patterns"),
    Parity("plain", "DeloraConfig", {**PLAIN, "bias": "delora_only"}, "bias"),
    Parity("llama", "DeloraConfig", LLAMA, train=True),
]
