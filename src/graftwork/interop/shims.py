"""What PEFT has and this library does otherwise, for programs that name it."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType, TargetConfig, pattern_matches
from ..engine.dense import dense
from ..engine.host import Host
from ..engine.module import PARAM, ModuleHost
from ..engine.root import Grafted
from ..engine.ties import Tied
from ..engine.tree import inside
from ..methods.lora import LoRA
from ..model import report
from ..model.peft_model import PeftModel
from ..parts.tokens import Tokens
from ..parts.whole import Bias, Copy, Whole
from ..table import METHODS
from ..targets.defaults import IA3_FEEDFORWARD, TARGETS
from .names import INSTALLED

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"


class _Having(type):
    """A class whose instances are the hosts that have a part of some kind."""

    part: type[nn.Module] | None

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, Host):
            return False
        if cls.part is None:
            return True
        return any(
            isinstance(p, cls.part) for n in instance.adapters for _, p in instance.parts_of(n)
        )


class _Acting(type):
    """A class whose instances are the hosts in which a method acts by itself."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Host) and (
            not len(instance.adapters)
            or any(_is_own(*part) for n in instance.adapters for part in instance.parts_of(n))
        )


def _is_own(key: str, part: nn.Module) -> bool:
    """Whether a part is its method's, and not one that a config brings along."""
    part = part.source[0] if isinstance(part, Tied) else part
    beside = isinstance(part, (Bias, Whole)) or (isinstance(part, Tokens) and part.prefix)
    return not beside and not (isinstance(part, Copy) and key == "copy")


class BaseTunerLayer(metaclass=_Acting):
    """PEFT's base of its layers. A host that only holds a copy of a module, or rows of one, is
    none: TRL asks before it reads an output layer's weight.
    """


class AuxiliaryTrainingWrapper(metaclass=_Having):
    """PEFT's base of wrappers that are no tuner layers; every host tells where its tensors go."""

    part = None


class ModulesToSaveWrapper(metaclass=_Having):
    """A host in which an adapter trains a whole module."""

    part = Copy


class TrainableTokensWrapper(metaclass=_Having):
    """A host in which an adapter trains rows of an embedding."""

    part = Tokens


class LoraLayer(metaclass=_Having):
    """A host with a LoRA."""

    part = LoRA


class _Around(type):
    """A class whose instances are the hosts around layers of some types, by their names."""

    layers: frozenset[str]

    def __instancecheck__(cls, instance: Any) -> bool:
        kinds = type(inside(instance)).__mro__ if isinstance(instance, Host) else ()
        return not cls.layers.isdisjoint(kind.__name__ for kind in kinds)


def _around(name: str, *others: str) -> _Around:
    doc = f"A host around a layer of PEFT's ``{name}``."
    return _Around(name, (), {"layers": frozenset({name, *others}), "__doc__": doc})


Linear = _around("Linear", "Conv1D")
Embedding = _around("Embedding")
Conv1d, Conv2d, Conv3d = (_around(f"Conv{n}d") for n in (1, 2, 3))
MultiheadAttention = _around("MultiheadAttention")
Linear4bit, Linear8bitLt = _around("Linear4bit"), _around("Linear8bitLt")
GPTQLoraLinear, EetqLoraLinear = _around("BaseQuantLinear"), _around("EetqLinear")


class _AtParameters(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, ModuleHost) or isinstance(instance, MultiheadAttention):
            return False
        keys = [key for name in instance.adapters for key, _ in instance.parts_of(name)]
        return any(key.startswith(PARAM) for key in keys)


class ParamWrapper(metaclass=_AtParameters):
    """A host in which an adapter sits at bare parameters, such as stacked experts."""


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
) -> nn.Module:
    """Freeze a model and let gradients flow through its checkpoints; nothing is cast to fp32.

    Args:
        model: a model of transformers.
        use_gradient_checkpointing: switch gradient checkpointing on.
        gradient_checkpointing_kwargs: its options.
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


def get_layer_status(model: nn.Module) -> list[report.TunerLayerStatus]:
    """PEFT's report on each adapted layer."""
    return report.layer_status(_root(model))


def get_model_status(model: nn.Module) -> report.TunerModelStatus:
    """PEFT's report on the model."""
    if isinstance(model, PeftModel):
        return report.model_status(model)
    raise TypeError(f"get_model_status needs a PeftModel, not a {type(model).__name__}")


def _root(model: nn.Module) -> Grafted:
    if isinstance(model, PeftModel):
        return model.base_model
    if isinstance(model, Grafted):
        return model
    raise TypeError(f"get_layer_status needs a PeftModel, not a {type(model).__name__}")


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


# what PEFT's tensor names begin with, where it is not the method's name
_PREFIX = {
    "ADALORA": "lora_",
    "LOHA": "hada_",
    "VERA": "vera_lambda_",
    "PVERA": "pvera_lambda_",
}


def _mapping() -> dict[PeftType, type[PeftConfig]]:
    return {
        PeftType(name): row.config for name, row in METHODS.items() if name in PeftType.__members__
    }


def __getattr__(name: str) -> Any:
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        return _mapping()
    if name == "PEFT_TYPE_TO_TUNER_MAPPING":
        return dict.fromkeys(_mapping(), Grafted)
    if name == "PEFT_TYPE_TO_PREFIX_MAPPING":
        return {kind: _PREFIX.get(kind.value, f"{kind.value.lower()}_") for kind in _mapping()}
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
    raise AttributeError(name)
