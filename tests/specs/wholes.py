"""What is trained as a whole: norms, modules, biases; and bottlenecks."""

from graftwork import BitFitConfig, BottleneckConfig, FullConfig, LNTuningConfig
from specs import Case, Parity

CASES = {
    "ln_tuning": Case(LNTuningConfig, main=True),
    "full": Case(FullConfig, main=True),
    "bitfit": Case(BitFitConfig, needs="biased", main=True),
    "bottleneck": Case(lambda: BottleneckConfig(reduction_factor=2), main=True, lacks="stacked"),
    "bottleneck_gelu": Case(
        lambda: BottleneckConfig(reduction_factor=3, non_linearity="gelu", scaling=0.5),
        lacks="stacked",
    ),
    "bottleneck_parallel": Case(
        lambda: BottleneckConfig(reduction_factor=2, kind="parallel"), lacks="stacked ids",
        but="conv2d conv2d_groups conv3d conv1d conv2d_depthwise",
    ),
}  # fmt: skip
PARITY = [
    Parity("llama", "LNTuningConfig", {}, "default", train=True),
    Parity("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    Parity("plain", "LNTuningConfig", {"target_modules": ["norm", "lin0", "conv1"]}),
]
