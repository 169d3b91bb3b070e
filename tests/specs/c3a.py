"""C3A. Blocks of more than one do not divide the 9 numbers of a depthwise kernel."""

from graftwork import C3AConfig
from specs import Case, Parity

CASES = {
    "c3a": Case(lambda: C3AConfig(block_size=2), identity=False, main=True, but="conv2d_depthwise"),
    "c3a_zero": Case(lambda: C3AConfig(block_size=1, init_weights=True)),
}
PLAIN = {"block_size": 8, "target_modules": ["lin0", "lin1"]}
LLAMA = {"block_size": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "C3AConfig", PLAIN),
    Parity("plain", "C3AConfig", {**PLAIN, "block_size_pattern": {"lin0": 4}}, "pattern"),
    Parity("plain", "C3AConfig", {**PLAIN, "init_weights": True, "bias": "c3a_only"}, "zero"),
    Parity("plain", "C3AConfig", {**PLAIN, "init_weights": "gaussian"}, "gaussian"),
    Parity("plain", "C3AConfig", {**PLAIN, "init_weights": "kaiming_uniform"}, "kaiming"),
    Parity("plain", "C3AConfig", {**PLAIN, "init_weights": False, "block_size": 1}, "ones"),
    Parity("llama", "C3AConfig", LLAMA, train=True),
    Parity("llama", "C3AConfig", {"block_size": 16, "layers_to_transform": [1]}, "block"),
]
