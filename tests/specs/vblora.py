"""VB-LoRA."""

from graftwork import VBLoRAConfig
from specs import Case, Parity

SMALL = {"num_vectors": 5, "init_vector_bank_bound": 0.5}
CASES = {
    "vblora": Case(lambda: VBLoRAConfig(r=2, vector_length=2, **SMALL), main=True, identity=False),
    "vblora_uneven": Case(
        lambda: VBLoRAConfig(r=2, vector_length=5, topk=3, **SMALL), identity=False
    ),
}
TWO = {"r": 3, "num_vectors": 6, "vector_length": 8, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 3, "num_vectors": 9, "vector_length": 16}
PARITY = [
    Parity("plain", "VBLoRAConfig", TWO),
    Parity("plain", "VBLoRAConfig",
           {**TWO, "topk": 4, "init_vector_bank_bound": 0.5, "bias": "vblora_only"}, "top4"),
    Parity("plain", "VBLoRAConfig", {**TWO, "save_only_topk_weights": True}, "brief"),
    Parity("plain", "VBLoRAConfig",
           {**TWO, "save_only_topk_weights": True, "topk": 3, "num_vectors": 300}, "brief_int16"),
    Parity("plain", "VBLoRAConfig", {**TWO, "save_only_topk_weights": True, "topk": 1}, "one"),
    Parity("llama", "VBLoRAConfig",
           {**LLAMA, "target_modules": ["q_proj", "v_proj", "down_proj"]}, train=True),
    Parity("gpt2", "VBLoRAConfig", LLAMA),
]  # fmt: skip
