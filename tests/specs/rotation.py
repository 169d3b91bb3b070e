"""OFT, BOFT, HRA: rotations of the inputs."""

from graftwork import BOFTConfig, HRAConfig, OFTConfig
from specs import Case, Parity

NINE = "conv2d_depthwise"  # kernels of 9 numbers, which blocks of two do not divide
BLOCK = {"r": 0, "oft_block_size": 2}
CASES = {
    "oft": Case(lambda: OFTConfig(**BLOCK), main=True, but=NINE),
    "oft_one_block": Case(lambda: OFTConfig(r=1, oft_block_size=0)),
    "oft_exact": Case(lambda: OFTConfig(**BLOCK, use_cayley_neumann=False), but=NINE),
    "oft_shared": Case(lambda: OFTConfig(**BLOCK, block_share=True), but=NINE),
    "oft_coft": Case(lambda: OFTConfig(r=1, oft_block_size=0, coft=True, eps=0.4)),
    "oft_random": Case(lambda: OFTConfig(**BLOCK, init_weights=False), identity=False, but=NINE),
    "boft": Case(lambda: BOFTConfig(boft_block_size=2), main=True, but=NINE),
    "boft_one_block": Case(lambda: BOFTConfig(boft_block_size=0, boft_block_num=1)),
    "boft_two_factors": Case(
        lambda: BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2),
        but=f"{NINE} embedding embedding_padding embedding_max_norm embedding_scaled "
        "attention_unequal",  # 4 divides neither 6 nor 9
    ),
    "boft_random": Case(
        lambda: BOFTConfig(boft_block_size=2, init_weights=False), identity=False, but=NINE
    ),
    "hra": Case(lambda: HRAConfig(r=2), main=True),
    "hra_four": Case(lambda: HRAConfig(r=4)),
    "hra_random": Case(lambda: HRAConfig(r=3, init_weights=False), identity=False),
    "hra_gram_schmidt": Case(
        lambda: HRAConfig(r=2, apply_GS=True, init_weights=False), identity=False
    ),
}
LINEAR = ["lin0", "lin1"]
OFT = {"r": 0, "oft_block_size": 4, "target_modules": LINEAR}
BOFT = {"boft_block_size": 4, "target_modules": LINEAR}
HRA = {"r": 4, "target_modules": LINEAR}
LLAMA = ["q_proj", "v_proj", "down_proj"]
PARITY = [
    Parity("plain", "OFTConfig", OFT),
    Parity("plain", "OFTConfig", {"r": 2, "oft_block_size": 0, "target_modules": LINEAR}, "r"),
    Parity("plain", "OFTConfig", {**OFT, "oft_block_size": 5}, "adjusted"),
    Parity("plain", "OFTConfig", {"r": 3, "oft_block_size": 0, "target_modules": LINEAR}, "r_adj"),
    Parity("plain", "OFTConfig", {**OFT, "use_cayley_neumann": False}, "exact"),
    Parity("plain", "OFTConfig", {**OFT, "num_cayley_neumann_terms": 2}, "two_terms"),
    Parity("plain", "OFTConfig", {**OFT, "num_cayley_neumann_terms": 3}, "three_terms"),
    Parity("plain", "OFTConfig", {**OFT, "num_cayley_neumann_terms": 4}, "four_terms"),
    Parity("plain", "OFTConfig", {**OFT, "num_cayley_neumann_terms": 8}, "eight_terms"),
    Parity("plain", "OFTConfig", {**OFT, "block_share": True, "bias": "oft_only"}, "shared"),
    Parity("plain", "OFTConfig", {**OFT, "coft": True, "eps": 0.2}, "coft"),
    Parity("plain", "OFTConfig", {**OFT, "init_weights": False}, "random"),
    Parity("plain", "OFTConfig", {**OFT, "target_modules": ["emb"]}, "emb"),
    Parity("llama", "OFTConfig", {**OFT, "target_modules": LLAMA}, train=True),
    Parity("llama", "OFTConfig",
           {**OFT, "target_modules": LLAMA, "coft": True, "eps": 0.25, "block_share": True}, "coft",
           train=True, shake=0.05),  # from within the ball
    Parity("plain", "BOFTConfig", BOFT),
    Parity("plain", "BOFTConfig",
           {"boft_block_size": 0, "boft_block_num": 2, "target_modules": LINEAR}, "num"),
    Parity("plain", "BOFTConfig", {**BOFT, "init_weights": False}, "random"),
    Parity("plain", "BOFTConfig", {**BOFT, "target_modules": ["conv2"]}, "conv"),
    Parity("llama", "BOFTConfig", {**BOFT, "target_modules": LLAMA}, train=True),
    Parity("plain", "HRAConfig", HRA),
    Parity("plain", "HRAConfig", {**HRA, "apply_GS": True}, "gram_schmidt"),
    Parity("plain", "HRAConfig", {**HRA, "r": 3, "init_weights": False}, "odd"),
    Parity("plain", "HRAConfig", {**HRA, "target_modules": ["conv2"]}, "conv"),
    Parity("llama", "HRAConfig", {**HRA, "target_modules": LLAMA}, train=True),
    Parity("llama", "HRAConfig",
           {**HRA, "target_modules": LLAMA, "apply_GS": True, "init_weights": False}, "gs",
           train=True),
]  # fmt: skip
