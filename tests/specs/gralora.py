"""GraLoRA. Two blocks do not divide the 9 numbers of a depthwise kernel."""

from graftwork import GraloraConfig
from specs import Case, Parity

CASES = {
    "gralora": Case(lambda: GraloraConfig(r=4), main=True, but="conv2d_depthwise"),
    "gralora_hybrid": Case(lambda: GraloraConfig(r=2, hybrid_r=1), but="conv2d_depthwise"),
    "gralora_one": Case(lambda: GraloraConfig(r=2, gralora_k=1, hybrid_r=2)),
    "gralora_random": Case(
        lambda: GraloraConfig(r=2, gralora_k=1, init_weights=False), identity=False
    ),
}
PLAIN = {"r": 4, "alpha": 6, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    Parity("plain", "GraloraConfig", PLAIN),
    Parity("plain", "GraloraConfig", {**PLAIN, "gralora_k": 4, "hybrid_r": 3}, "hybrid"),
    Parity("plain", "GraloraConfig", {**PLAIN, "init_weights": False, "gralora_k": 1}, "random"),
    Parity("plain", "GraloraConfig", {**PLAIN, "bias": "gralora_only"}, "bias"),
    Parity("llama", "GraloraConfig", LLAMA, train=True),
    Parity("llama", "GraloraConfig", {**LLAMA, "hybrid_r": 2}, "hybrid", train=True),
    Parity("gpt2", "GraloraConfig", {"r": 4, "hybrid_r": 2}),
]
