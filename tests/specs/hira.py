"""HiRA. PEFT ignores rank_pattern, and dropout, padding and scale of an embedding."""

from graftwork import HiraConfig
from specs import Case, Parity

CASES = {
    "hira": Case(lambda: HiraConfig(r=3), main=True),
    "hira_gaussian": Case(lambda: HiraConfig(r=2, init_weights="gaussian")),
    "hira_random": Case(lambda: HiraConfig(r=2, init_weights=False), identity=False),
}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "HiraConfig", PLAIN),
    Parity("plain", "HiraConfig", {**PLAIN, "init_weights": "gaussian"}, "gaussian"),
    Parity("plain", "HiraConfig", {**PLAIN, "init_weights": False}, "random"),
    Parity("plain", "HiraConfig", {"r": 4, "target_modules": ["conv1", "conv2", "conv3"]}, "conv"),
    Parity("plain", "HiraConfig", {"r": 4, "target_modules": ["emb", "lin0"]}, "embedding"),
    Parity("llama", "HiraConfig", LLAMA, train=True),
    Parity("gpt2", "HiraConfig", {"r": 4}),
    Parity("gpt2", "HiraConfig", {"r": 4, "target_modules": ["c_attn", "wte"]}, "embedding"),
]
