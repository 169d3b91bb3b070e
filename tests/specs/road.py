"""RoAd: rotations of pairs of outputs."""

from graftwork import RoadConfig
from specs import Case, Parity

ODD = "conv2d_groups conv2d_depthwise"  # 3 or 1 outputs see the same inputs: none can be paired
CASES = {
    "road": Case(lambda: RoadConfig(group_size=2), main=True, but=ODD),
    "road_2": Case(lambda: RoadConfig(variant="road_2", group_size=2), but=ODD),
    "road_4": Case(lambda: RoadConfig(variant="road_4", group_size=2), but=ODD),
    "road_random": Case(
        lambda: RoadConfig(group_size=2, init_weights=False), identity=False, but=ODD
    ),
}
PLAIN = {"group_size": 8, "target_modules": ["lin0", "lin1"]}
LLAMA = {"group_size": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PARITY = [
    *(Parity("plain", "RoadConfig", {**PLAIN, "variant": v}, v)
      for v in ("road_1", "road_2", "road_4")),
    Parity("plain", "RoadConfig", {**PLAIN, "init_weights": False}, "random"),
    *(Parity("llama", "RoadConfig", {**LLAMA, "variant": v}, v, train=True)
      for v in ("road_1", "road_2", "road_4")),
]  # fmt: skip
