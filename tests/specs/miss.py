"""MiSS. Tiles of two do not divide the 9 numbers of a depthwise kernel."""

from graftwork import MissConfig
from specs import Case, Parity

CASES = {
    "miss": Case(lambda: MissConfig(r=3), main=True),
    "miss_random": Case(lambda: MissConfig(r=3, init_weights=False), identity=False),
    "miss_mini": Case(lambda: MissConfig(r=2, mini_r=2, init_weights="mini")),
    "miss_bat": Case(
        lambda: MissConfig(r=2, init_weights="bat"), main=True, but="conv2d_depthwise"
    ),
}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}  # 6 does not divide 32
BAT = {**LLAMA, "r": 8, "init_weights": "bat"}
MINI = {**LLAMA, "init_weights": "mini", "mini_r": 4}
PARITY = [
    Parity("plain", "MissConfig", PLAIN),
    Parity("plain", "MissConfig", {**PLAIN, "r": 5}, "padded"),
    Parity("plain", "MissConfig", {**PLAIN, "init_weights": False, "bias": "miss_only"}, "random"),
    Parity("plain", "MissConfig", {**PLAIN, "init_weights": "mini", "mini_r": 8}, "mini"),
    Parity("plain", "MissConfig", {**PLAIN, "init_weights": "bat"}, "bat"),
    Parity("llama", "MissConfig", LLAMA, train=True),
    Parity("llama", "MissConfig", MINI, "mini", train=True),
    Parity("llama", "MissConfig", BAT, "bat", train=True),
]
