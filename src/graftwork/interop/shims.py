"""What PEFT has and this library does otherwise, for programs that name it."""

from __future__ import annotations

import functools
import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType, TargetConfig, pattern_matches
from ..engine.dense import dense
from ..engine.tree import inside
from ..table import METHODS
from ..targets.defaults import IA3_FEEDFORWARD, TARGETS
from . import tuners
from .facts import prefix_of
from .names import INSTALLED, NAMES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # as in PEFT 0.21
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """FSDP1: wrap each adapter by itself, beside the model's own blocks."""
    from torch.distributed.fsdp.wrap import (
        _or_policy,
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    from ..engine.adapter import Adapter

    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = {type(m) for m in model.modules() if type(m).__name__ in names}
    adapters = functools.partial(
        lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, Adapter)
    )
    whole = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    return functools.partial(_or_policy, policies=[adapters, whole])


def check_target_module_exists(config: TargetConfig, key: str) -> bool:
    """Whether a config's target_modules mean the layer called ``key``."""
    wanted = config.target_modules
    if isinstance(wanted, str):
        return pattern_matches(wanted, key)
    return any(key == name or key.endswith(f".{name}") for name in wanted or ())


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a model and let gradients flow through its checkpoints; nothing is cast to fp32.

    Args:
        model: a model of transformers.
        use_gradient_checkpointing: switch gradient checkpointing on.
        gradient_checkpointing_kwargs: its options.
        auto_clear_cache: PEFT's option.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        inner: Any = model
        new = hasattr(inner, "activation_checkpointing_enable")
        enable = (
            inner.activation_checkpointing_enable if new else inner.gradient_checkpointing_enable
        )
        enable(gradient_checkpointing_kwargs)
        inner.enable_input_require_grads()
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in ``dtype``, trained ones in fp32."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A config from a dictionary with its ``peft_type``."""
    return PeftConfig.from_peft_type(**config_dict)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or hub id is an adapter's."""
    from ..errors import FileError

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except FileError:
        return False
    return True


def infer_device() -> str:
    """The accelerator's type, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight, transposed where it stands the other way round."""
    return weight.mT if fan_in_fan_out else weight


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as a dense tensor."""
    return dense(inside(module).get_parameter("weight"))


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module at a path, that module, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _mapping() -> dict[PeftType, type[PeftConfig]]:
    return {
        PeftType(name): row.config for name, row in METHODS.items() if name in PeftType.__members__
    }


def __getattr__(name: str) -> Any:
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        return _mapping()
    if name in ("PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"):
        own = _mapping() if "TUNER" in name else map(PeftType, _MIXED)
        return {kind: _tuner(kind) for kind in own}
    if name == "PEFT_TYPE_TO_PREFIX_MAPPING":
        return {kind: prefix_of(kind.value) for kind in _mapping()}
    if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
        method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix(
            "_TARGET_MODULES_MAPPING"
        )
        method = "LN_TUNING" if method == "LNTUNING" else method
        if method in METHODS:
            return dict(TARGETS.get(method, {}))
    if name == "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING":
        return dict(IA3_FEEDFORWARD)
    if name in INSTALLED:
        return lambda *_, **__: find_spec(INSTALLED[name]) is not None
    if name.startswith("is_transformers_"):
        return _transformers(name)
    raise AttributeError(name)


def _transformers(name: str) -> bool:
    """PEFT's constants about transformers: ``is_transformers_ge_v5_4_0``, ``..._le_4_53``."""
    here = tuple(int(n) for n in re.findall(r"\d+", version("transformers"))[:3])
    if name == "is_transformers_dtensor_tp":
        return here >= (5, 17, 0)
    asked = tuple(int(n) for n in re.findall(r"\d+", name))
    return here >= asked if "_ge_" in name else here[: len(asked)] <= asked


_MIXED = "LORA ADALORA BEFT HIRA IA3 LOHA LOKR SHIRA ROAD".split()
_PROMPTS = {
    "CARTRIDGE": "CartridgeEncoder",
    "CPT": "CPTEmbedding",
    "MULTITASK_PROMPT_TUNING": "MultitaskPromptEmbedding",
    "P_TUNING": "PromptEncoder",
    "PREFIX_TUNING": "PrefixEncoder",
    "PROMPT_TUNING": "PromptEmbedding",
}


def _tuner(kind: PeftType) -> type[Any]:
    if kind.value not in _PROMPTS:
        return tuners.tuner(kind.value)
    where, name = NAMES[_PROMPTS[kind.value]]
    found: type[Any] = getattr(import_module(f"graftwork.{where}"), name)
    return found


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch has an XPU."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed."""
    return find_spec("torch_xla") is not None


def is_npu_available(check_device: bool = False) -> bool:
    """Whether torch_npu is installed."""
    return find_spec("torch_npu") is not None


def is_mlu_available(check_device: bool = False) -> bool:
    """Whether torch_mlu is installed."""
    return find_spec("torch_mlu") is not None


mlu_available = False


def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is that new."""
    if find_spec("torchao") is None:
        return False
    return tuple(int(n) for n in re.findall(r"\d+", version("torchao"))[:2]) >= (0, 18)
