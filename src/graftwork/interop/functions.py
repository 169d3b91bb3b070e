"""PEFT's functions and constants that this library has no use for itself, for programs that do."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import PeftConfig, PeftType
from ..engine.host import Host
from ..engine.tree import hosts, inside, walk
from ..errors import StateError, TargetError
from ..model.functional import user_model
from .classes import is_own

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = tuple(f"float8_{t}" for t in "e4m3fn e4m3fnuz e5m2 e5m2fnuz e8m0fnu".split())
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
VARIANT_KWARG_KEYS = ["alora_offsets"]
CONFIG_KEYS_TO_CHECK = {
    PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"],
}
COMPATIBLE_TUNER_TYPES = tuple(PeftType(t) for t in "LORA LOHA LOKR ADALORA OFT SHIRA".split())
PREFIXES = ["lora_", "lokr_", "hada_", "oft_", "shira_"]
ENABLE_DORA_CACHING = False
TASK_ADAPTER_PREFIX, GKS_ADAPTER_PREFIX = "task_", "gks_"
ALL_LAYERNORM_LAYERS = [nn.LayerNorm]
EPS = 1e-12
RoadVariant = Literal["road_1", "road_2", "road_4"]


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's tensors under its own names, without any adapter's.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
    """
    found = {}
    for path, module in walk(user_model(model)):
        own, front = inside(module), f"{path}." if path else ""
        passing = own._non_persistent_buffers_set
        names = [*own._parameters, *(n for n in own._buffers if n not in passing)]
        for name in names:
            held = module.pristine(name) if isinstance(module, Host) else getattr(own, name)
            if held is not None:
                found[front + name] = held.detach()
    return found


def set_base_model_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], strict: bool = True
) -> Any:
    """Give the base model tensors under its own names; the adapters stay.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        state_dict: what ``get_base_model_state_dict`` gives, or a checkpoint of the base model.
        strict: whether a missing or unexpected name is an error.

    Raises:
        RuntimeError: with ``strict``, names that are missing or unexpected; another shape.
    """
    from torch.nn.modules.module import _IncompatibleKeys

    own = get_base_model_state_dict(model)
    missing, unexpected = sorted(own.keys() - state_dict), sorted(state_dict.keys() - own)
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"Missing key(s) in state_dict: {missing}. Unexpected key(s) in state_dict: "
            f"{unexpected}. Give the base model's tensors, under its own names, or strict=False"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state_dict:
                tensor.copy_(state_dict[name])
    return _IncompatibleKeys(missing, unexpected)


def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """An adapter's tensors in fp32 where they are fp16 or bf16."""
    for host in hosts(user_model(model)).values() if autocast_adapter_dtype else ():
        for module in [host.adapters[adapter_name]] if adapter_name in host.adapters else []:
            for p in module.parameters():
                if p.dtype in (torch.float16, torch.bfloat16):
                    p.data = p.data.float()


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What two tensors in the same memory have in common: device, address and size in bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels as a decoder's inputs: the start in front, the last one gone, -100 as padding."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    moved = torch.cat([start, input_ids[:, :-1]], dim=1)
    return moved.masked_fill(moved == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(past_key_values: Any) -> Any:
    """A prefix (layers x 2, rows, heads, tokens, size) in the order of BLOOM's old cache."""
    keys, values = torch.cat(tuple(past_key_values)).chunk(2)
    layers, rows, heads, tokens, size = keys.shape
    keys = keys.reshape(layers, rows * heads, tokens, size).mT
    values = values.reshape(layers, rows * heads, tokens, size)
    return tuple(zip(keys, values, strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: Any) -> Any:
    """A prefix in the order of GPT-BigCode's old cache: one head, keys and values side by side."""
    return tuple(
        layer[:, :, 0].permute(1, 2, 0, 3).flatten(start_dim=-2) for layer in past_key_values
    )


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """A dimension as a product of two: ``factor`` first, or the largest divisor below it."""
    from ..methods.lokr import split

    return split(dimension, factor)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Stop where PEFT would not swap the second adapter in for the first.

    Raises:
        ValueError: the methods differ or are no LoRA, or options that shape the computation do.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {config0.method} and {config1.method}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(f"Hotswapping only supports LORA but {config0.method} was passed.")
    one, two = config0.to_dict(), config1.to_dict()
    for key in CONFIG_KEYS_TO_CHECK[PeftType(config0.peft_type)]:
        if one.get(key) != two.get(key):
            raise ValueError(
                f"Configs are incompatible: for {key}, {one.get(key)} != {two.get(key)}"
            )


def register_peft_method(
    *,
    name: str,
    config_cls: Any,
    model_cls: Any,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """PEFT's way to a method of one's own, by classes of layers that PEFT's engine runs.

    Raises:
        KeyError: the name is that of a method that is there.
        TargetError: always else; the message says how a method is made here.
    """
    if name.upper() in PeftType.__members__:
        raise KeyError(f"Given name {name!r} is already registered")
    raise TargetError(
        f"register_peft_method(name={name!r}) takes layers that PEFT's engine runs, and this is "
        "graftwork's; a method is one adapter with its formula: graftwork.register(name, config, "
        "...), see docs/custom-methods.md"
    )


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """A pattern of ``target_modules`` against a module's whole name."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first key of a ``rank_pattern`` that means a module; else the module's name."""
    for key in pattern_keys:
        if re.match(rf"(.*\.)?({key})$", key_to_match):
            return key
    return key_to_match


def _is_valid_match(key: str, target_key: str) -> bool:
    return key.endswith(target_key) and (key == target_key or key.endswith(f".{target_key}"))


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Which modules of a model an adapter's ``target_modules`` mean, and which not."""
    from ..targets.match import Match
    from ..targets.offer import Offer

    offer = Offer(user_model(tuner))
    wanted = {t.path for t in Match(offer, tuner.peft_config[adapter_name]).targets()}
    names = [path for path in offer.modules if path]
    return {
        "matched": [n for n in names if n in wanted],
        "unmatched": [n for n in names if n not in wanted],
    }


def check_adapters_to_merge(module: Any, adapter_names: Sequence[str] | None = None) -> list[str]:
    """The adapters of a layer that are not merged yet, with PEFT's warnings.

    Raises:
        ValueError: one name instead of a list.
    """
    from ..errors import warn

    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    wanted = list(module.active_adapters if adapter_names is None else adapter_names)
    new = [n for n in wanted if n not in module.merged_adapters]
    if module.merged and new:
        warn(
            f"Already following adapters were merged {','.join(module.merged_adapters)}. You are "
            f"now additionally merging {','.join(new)}.",
            UserWarning,
        )
    elif module.merged:
        warn("All adapters are already merged, nothing to do.", UserWarning)
    return new


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; ``share_weights``: around the same tensors."""
    memo = {id(p): p for p in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, memo)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for host in hosts(user_model(model)).values():
        host.set_requires_grad(adapter_name, False)


def _set_adapter(model: nn.Module, adapter_name: Any, inference_mode: bool = False) -> None:
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    for host in hosts(user_model(model)).values():
        beside = any(not is_own(*pair) for n in host.adapters for pair in host.parts_of(n))
        for name in host.adapters if beside else ():
            host.set_requires_grad(name, name in names and not inference_mode)


def _set_trainable(
    model: nn.Module, adapter_name: str, module_names: Any, inference_mode: bool = False, **_: Any
) -> None:
    raise StateError(
        f"modules {list(module_names)} become trainable with their adapter: give them in the "
        "config's modules_to_save, before the adapter is made"
    )


def set_additional_trainable_modules(
    model: Any,
    peft_config: Any,
    model_config: Any,
    adapter_name: str,
    activate_adapter: bool = True,
) -> None:
    """PEFT's second step of an injection; here an adapter brings them along from the start."""


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return len(given)


def _get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    if not hasattr(model, "get_input_embeddings"):
        return default
    table = inside(model.get_input_embeddings())
    found = (path for path, m in walk(user_model(model)) if inside(m) is table)
    return next(found, default)


def _prepare_prompt_learning_config(peft_config: Any, model_config: Any) -> Any:
    from ..prompts.config import NAMES

    peft_config = copy.copy(peft_config)
    text = getattr(model_config, "text_config", model_config)
    for field, names in NAMES.items():
        if getattr(peft_config, field, None) is None:
            read = text.get if isinstance(text, dict) else functools.partial(getattr, text)
            values = [read(name, None) for name in names.split()]
            found = next((v for v in values if v is not None), None)
            if found is None:
                raise ValueError(f"Please specify `{field}` in `peft_config`")
            setattr(peft_config, field, found)
    return peft_config


def str_to_bool(value: str) -> int:
    """1 for y, yes, t, true, on and 1, 0 for their opposites.

    Raises:
        ValueError: another word.
    """
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a file is on the hub; None where it cannot be asked."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return None


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a host stands around an embedding or an output layer."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(
    model: Any, layer: nn.Module, is_embedding_in_target_modules: bool
) -> str | None:
    """The name of an embedding or output layer in a model."""
    for name, module in model.named_modules():
        if module is (layer if is_embedding_in_target_modules else inside(layer)):
            return str(name)
    return None


def convert_peft_config_for_transformers(peft_config: Any, model: Any, conversions: Any) -> None:
    """Name the stacked experts that a config in old names means, in place."""
    from ..targets.experts import spell_out
    from ..targets.offer import Offer

    if hasattr(peft_config, "rank_pattern"):
        spell_out(peft_config, Offer(user_model(model)))


def random_mask(
    base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any
) -> Tensor:
    """SHiRA's mask: as many ones in a weight (out, in) as a LoRA of rank r has numbers."""
    weight: Any = base_layer.weight
    out, in_ = weight.shape
    generator = torch.Generator(device=weight.device)
    if random_seed is not None:
        generator.manual_seed(random_seed)
    order = torch.randperm(out * in_, generator=generator, device=weight.device)
    mask = torch.zeros(out * in_, dtype=weight.dtype, device=weight.device)
    return mask.scatter(0, order[: r * (out + in_)], 1.0).reshape(out, in_)


def __getattr__(name: str) -> Any:
    if name != "AdamssAsaCallback":
        raise AttributeError(name)
    from transformers import TrainerCallback

    doc = "PEFT's way to AdaMSS's schedule; here the optimizer's step drives it."
    return type(name, (TrainerCallback,), {"__doc__": doc})
