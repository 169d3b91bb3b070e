"""The methods, as data: the command line, the documentation and the tests read this table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import StateError, did_you_mean

if TYPE_CHECKING:
    from .config import PeftConfig


@dataclass
class Method:
    """One row: where a method's config class lives, and what the method does in one line."""

    name: str
    where: str  # "module:ConfigClass"
    about: str
    paper: str = ""
    family: str = ""

    @property
    def module(self) -> str:
        """Where the config class is, inside this package."""
        return self.where.partition(":")[0].removeprefix("graftwork.")

    @cached_property
    def config(self) -> type[PeftConfig]:
        module, _, name = self.where.partition(":")
        found: type[PeftConfig] = getattr(import_module(module), name)
        return found


# [family]
# name | module: config class | what it does | paper
_ROWS = """
[low rank]
LORA | lora_config: LoraConfig | low-rank update; also DoRA, rsLoRA, PiSSA, ... | 2106.09685
ADALORA | adalora: AdaLoraConfig | low-rank update whose ranks are learned | 2303.10512
LOHA | loha: LoHaConfig | Hadamard product of two low-rank matrices | 2108.06098
LOKR | lokr: LoKrConfig | Kronecker product of two small matrices | 2309.14859
DELORA | delora: DeloraConfig | low-rank update of unit directions, of learned strength | 2503.18225
GRALORA | gralora: GraloraConfig | a low-rank update for each block of the weight | 2505.20355
MISS | miss: MissConfig | one matrix that all blocks of the input share | 2409.15371
PEANUT | peanut: PeanutConfig | an update that a small network computes from the weight | 2410.01870
ADAMSS | adamss: AdamssConfig | small updates of clusters of outputs | https://openreview.net/forum?id=8ZdWmpYxT0
[virtual tokens]
PROMPT_TUNING | prompts.tokens: PromptTuningConfig | rows in front of the embeddings | 2104.08691
P_TUNING | prompts.encoder: PromptEncoderConfig | rows that a small network makes | 2103.10385
MULTITASK_PROMPT_TUNING | prompts.tasks: MultitaskPromptTuningConfig | rows tasks share | 2303.02861
CPT | prompts.cpt: CPTConfig | embeddings of examples that move a little | 2410.17222
PREFIX_TUNING | prompts.prefix: PrefixTuningConfig | keys and values in every layer | 2101.00190
P_TUNING_V2 | prompts.ptuning2: PTuningV2Config | the same for any task, encoders too | 2110.07602
CARTRIDGE | prompts.cartridge: CartridgeConfig | the keys and values of a text, trained | 2506.06266
ADAPTION_PROMPT | prompts.adaption: AdaptionPromptConfig | a second, gated attention | 2303.16199
[the weight multiplied]
OFT | oft: OFTConfig | rotations of blocks of the inputs | 2306.07280
BOFT | boft: BOFTConfig | butterfly rotations of the inputs, and gains of the outputs | 2311.06243
HRA | hra: HRAConfig | a chain of reflections of the inputs | 2405.17484
ROAD | road: RoadConfig | rotations of pairs of outputs | 2409.00119
PSOFT | psoft: PsoftConfig | rotations of the weight's principal subspace | 2505.11235
HIRA | hira: HiraConfig | the weight times a low-rank matrix, entry by entry | https://openreview.net/forum?id=TwJrTz9cRS
GLORA | glora: GloraConfig | the weight and bias scaled and shifted by low-rank terms | 2306.07967
DEFT | deft: DeftConfig | a subspace of the outputs, taken out and learned anew | 2509.22793
[shared bases]
VERA | vera: VeraConfig | two learned vectors around shared random projections | 2310.11454
PVERA | pvera: PveraConfig | VeRA whose hidden channels are sampled in training | 2512.07703
RANDLORA | randlora: RandLoraConfig | full-rank update of scaled random bases | 2502.00987
VBLORA | vblora: VBLoRAConfig | low-rank factors mixed from a bank of short vectors | 2405.15179
UNILORA | unilora: UniLoraConfig | one vector from which all low-rank entries are taken | 2506.00799
TINYLORA | tinylora: TinyLoraConfig | a few numbers in directions drawn at random | 2602.04118
FROD | frod: FrodConfig | coordinates in a basis of several layers | https://doi.org/10.1609/aaai.v40i31.39813
[sparse, spectral]
C3A | c3a: C3AConfig | circular convolutions of blocks of the input | 2407.19342
FOURIERFT | fourierft: FourierFTConfig | some Fourier coefficients of the update | 2405.03003
WAVEFT | waveft: WaveFTConfig | some wavelet coefficients of the update | 2505.12532
SHIRA | shira: ShiraConfig | some entries of the weight, chosen at random | 2406.13175
SUPERTUNING | supertuning: SupertuningConfig | the largest entries of the weight | 2607.09287
[activations and biases]
IA3 | ia3: IA3Config | one learned gain per channel | 2205.05638
BEFT | beft: BeftConfig | a bias for some layers, of the values by default | 2509.15974
BITFIT | bitfit: BitFitConfig | the biases alone | 2106.10199
BOTTLENECK | bottleneck: BottleneckConfig | small networks behind or beside layers | 1902.00751
[whole modules]
LN_TUNING | norm: LNTuningConfig | the norms, or other whole modules, trained | 2312.11420
OSF | osf: OSFConfig | the smaller singular directions, orthogonal to the larger | 2504.07097
FULL | full: FullConfig | whole modules, trained |
[tokens]
TRAINABLE_TOKENS | tokens: TrainableTokensConfig | some embedding rows, learned anew |
[routed, or beside the model]
POLY | poly: PolyConfig | a mixture of low-rank skills for each task | 2202.13914
LILY | lily: LilyConfig | low-rank experts across layers, mixed by the input | 2407.09946
XLORA | xlora: XLoraConfig | a mixture of trained LoRAs, chosen for each token | 2402.07148
SHADOW | shadow: ShadowConfig | a small model that follows the blocks and corrects their inputs |
"""


def _rows() -> Iterator[Method]:
    family = ""
    for line in _ROWS.strip().splitlines():
        if line.startswith("["):
            family = line[1:-1]
            continue
        name, where, about, paper = (word.strip() for word in line.split("|"))
        module, config = where.split(": ")
        module = module if "." in module else f"methods.{module}"
        yield Method(name, f"graftwork.{module}:{config}", about, paper, family)


METHODS = {row.name: row for row in _rows()}
CONFIGS = {row.where.partition(":")[2]: row for row in METHODS.values()}  # by their class's name


def method(name: str) -> Method:
    """The row of a method.

    Raises:
        StateError: no method has that name.
    """
    key = getattr(name, "value", str(name)).removeprefix("PeftType.")
    if key not in METHODS:
        raise StateError(
            f"graftwork has no method {key!r}{did_you_mean(key, METHODS)} It has {sorted(METHODS)}"
        )
    return METHODS[key]


def register(name: str, config: type[PeftConfig], about: str, paper: str = "") -> None:
    """Add a method of your own; its config class gives the adapter class and the fields.

    Args:
        name: the ``peft_type`` in files, in capitals.
        config: the config class.
        about: what the method does, in one line.
        paper: an arXiv number or an address.
    """
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already; choose another name")
    row = Method(name, f"{config.__module__}:{config.__qualname__}", about, paper, "registered")
    row.__dict__["config"] = config
    METHODS[name] = row
