"""PEFT's functions about quantised layers, devices and sharded parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.dense import dense
from ..engine.tree import inside


def get_quantization_config(model: Any, method: str) -> Any:
    """The quantization config of a model of that method; else None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if getattr(model, "quantization_method", None) == method else None


def get_quantization_kwargs(model: Any) -> dict[str, Any]:
    """What PEFT asks a model about its quantization; here layers are asked themselves."""
    return {
        f"loaded_in_{n}bit": bool(getattr(model, f"is_loaded_in_{n}bit", False)) for n in (8, 4)
    }


def quantization_extra_repr(module: nn.Module) -> str:
    """The quantization of the layer beneath, for a printed model; empty where there is none."""
    kind = get_bnb_param_type(getattr(inside(module), "weight", None))
    return f"quantization_backend=bnb_{kind}" if kind else ""


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> None:
    """PEFT's object for a quantised layer; here there is none: a site reads its layer itself."""


def get_bnb_param_type(param: Any) -> Any:
    """Whether a parameter is bitsandbytes' "4bit" or "8bit"; else False."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


def dequantize_bnb_weight(weight: Any, state: Any = None) -> Tensor:
    """A weight of bitsandbytes as a dense tensor."""
    return dense(weight)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed's ZeRO stage 3 is on."""
    if find_spec("transformers") is None or find_spec("deepspeed") is None:
        return False
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: Any = None) -> Any:
    """Within the block the whole of a parameter that DeepSpeed has cut."""
    if not check_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found]

    return deepspeed.zero.GatheredParameters(
        param, modifier_rank=modifier_rank, fwd_module=fwd_module
    )


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within the block modules are made without memory."""
    with torch.device("meta"):
        yield


def skip_init_on_device(func: Any) -> Any:
    """PEFT's guard against ``init_empty_weights``; here a part says where it is made."""

    @functools.wraps(func)
    def called(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return called


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Within the block the tensors of an offloaded layer are there (accelerate's hooks)."""
    every = [m for m in layer.modules() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
    for module in every:
        module._hf_hook.pre_forward(module)  # type: ignore[operator,union-attr]
    try:
        yield
    finally:
        for module in every:
            module._hf_hook.post_forward(module, torch.tensor([]))  # type: ignore[operator,union-attr]


def get_device_map(model: Any) -> dict[str, Any]:
    """Where a model's modules are."""
    if hasattr(model, "hf_device_map"):
        return dict(model.hf_device_map)
    return {"": next((p.device for p in model.parameters()), torch.device("cpu"))}


def get_layer_device_map(model: Any) -> dict[int, Any]:
    """Number of a block -> its device, of a model with accelerate's device map."""
    places = {n: d for n, d in model.hf_device_map.items() if d not in ("cpu", "disk")}
    main, count = next(iter(places.values())), model.config.num_hidden_layers
    found = {}
    for name in model.hf_device_map:
        for i in range(count) if name else ():
            if i not in found and f".{i}." in f"{name}.":
                found[i] = places.get(name, main)
    if "" in model.hf_device_map:
        return dict.fromkeys(range(count), main)
    for i in range(count):
        if i not in found:
            raise RuntimeError(f"layer {i} has not been mapped to a device.")
    return found


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values of a cache to the devices of their blocks."""
    if not getattr(model, "hf_device_map", None):
        return
    for i, device in get_layer_device_map(model).items():
        layer = cache.layers[i]
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
