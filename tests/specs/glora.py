"""GLoRA: five terms of a weight and its bias."""

from graftwork import GloraConfig
from specs import Case, Parity


def glora(*kinds: str, **options: object) -> GloraConfig:
    names = ("config_A_B", "config_C", "config_D_E")
    return GloraConfig(r=2, **dict(zip(names, kinds, strict=False)), **options)


CASES = {
    "glora": Case(glora, main=True),
    "glora_vector": Case(lambda: glora("vector", "vector", "vector")),
    "glora_constant": Case(lambda: glora("constant", "none")),
    "glora_bias": Case(lambda: glora("none", "vector", "none"), needs="bias"),
    "glora_random": Case(lambda: glora(init_weights=False), identity=False),
}
PLAIN = {"r": 4, "target_modules": ["lin0", "lin1"]}
LLAMA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
BERT = {"r": 3, "target_modules": ["query", "dense"]}
PARITY = [
    Parity("plain", "GloraConfig", {**PLAIN, "bias": "glora_only"}),
    *(Parity("plain", "GloraConfig",
             {**PLAIN, "config_A_B": ab, "config_C": c, "config_D_E": de, "init_weights": False},
             f"{ab}_{c}_{de}")
      for ab, c, de in (("lora", "vector", "vector"), ("vector", "none", "constant"),
                        ("constant", "lora", "none"), ("none", "lora", "constant"),
                        ("none", "none", "vector"))),
    Parity("bert", "GloraConfig", {**BERT, "config_D_E": "vector"}),
    Parity("llama", "GloraConfig", LLAMA, train=True),
    Parity("llama", "GloraConfig", {**LLAMA, "config_A_B": "vector"}, "vector", train=True),
    # not trained: at this step size one number for a whole matrix swings, and rounding grows
    Parity("llama", "GloraConfig", {**LLAMA, "config_A_B": "constant"}, "constant"),
]  # fmt: skip
