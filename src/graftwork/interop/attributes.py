"""PEFT's attributes of a layer, for ``as_peft()``: ``layer.lora_A["default"].weight`` is the very
parameter, ``layer.scaling["default"] = 2`` takes effect, ``layer.get_delta_weight(name)`` computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.adapter import Additive
from ..engine.host import NAMES, Host
from ..engine.tree import inside
from ..errors import StateError, warn
from ..model.scales import put
from .classes import is_own, methods_at
from .facts import LAYERS, SHOWN
from .tree import shape
from .views import Modules, Values, container


def install() -> None:
    """Give hosts PEFT's attributes from now on."""
    import_module("graftwork.model.layer")  # whose own come first
    for name in (*SHOWN, *MORE):
        NAMES[name] = partial(_shown, name)
    for function in SEEN:
        NAMES[function.__name__] = function
    for function in VERBS:
        NAMES[function.__name__] = partial(_bound, function)


MORE = "lora_diag original_module modules_to_save token_adapter ln_tuning_layers".split()


def _bound(function: Callable[..., Any], host: Host) -> Callable[..., Any]:
    return partial(function, host)


def _shown(name: str, host: Host) -> Any:
    """A container, or a value by adapter; what the layer itself has under this name comes after."""
    methods = methods_at(host)
    for method in methods:
        for group in LAYERS.get(method, ()):
            if name in group:
                return _container(host, name, group[name]) if group[name] else _values(host, name)
    found = shape(host)
    if found.module is host and name in found.children:
        return found.children[name]
    return getattr(host.base_layer, name)


def _container(host: Host, name: str, kind: str) -> nn.Module:
    found = shape(host)
    if name in found.children:
        return found.children[name]
    return container(kind, name, {}, host.base_layer)


def own_parts(host: Host) -> dict[str, Any]:
    """Each adapter's own part at a layer; at stacked parameters the outermost in PEFT."""
    found: dict[str, Any] = {}
    for name in host.adapters:
        for key, part in host.parts_of(name):
            if is_own(key, part) and (name not in found or not part.prefix):
                found[name] = part
    return found


def _values(host: Host, name: str) -> Values:
    values, owners = {}, {}
    for adapter, part in own_parts(host).items():
        config = host.switch.configs[adapter].at(host.path, "weight")
        if name == "scaling" or name.endswith("_scaling"):
            values[adapter], times = _scaling(part, config)
            if times is not None:
                owners[adapter] = part, times
        else:
            value = _value(name, part, config)
            if value is not None:
                values[adapter] = value
    return Values(name, values, owners)


def _scaling(part: Any, config: Any) -> tuple[Any, float | None]:
    """The scale as PEFT shows it, and how many times ours that is; None: it is in the tensors."""
    if config.method == "PSOFT":
        return config.psoft_alpha / config.r, None
    times = len(part.E) if config.method == "ADALORA" else 1  # which divides by the rank later
    return part.scale * times, times


# where the value is that PEFT shows under another name than the config's
_OPTIONS = {
    "supertuning_rank": "r",
    "deft_decomposition": "decomposition_method",
    "waveft_random_loc_seed": "random_loc_seed",
    "num_B": "num_B",
}
# what follows from a layer's sizes: (method, name) -> its value for a part
_SIZES: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("OFT", "r"): lambda part: part.n // part.k,
    ("OFT", "oft_block_size"): lambda part: part.k,
    ("BOFT", "boft_block_num"): lambda part: part.R.shape[1],
    ("BOFT", "boft_block_size"): lambda part: part.R.shape[2],
    ("OSF", "effective_rank"): lambda part: part.high,
    ("FROD", "r"): lambda part: len(part.shared.of("U", part.name)),
    ("RANDLORA", "r"): lambda part: None,
}


def _value(name: str, part: Any, config: Any) -> Any:
    method = config.method.lower()
    sized = _SIZES.get((config.method, name))
    if sized is not None and (value := sized(part)) is not None:
        return value
    if sized is None and name in ("r", f"{method}_r") and part.rank() is not None:
        return part.rank()
    for option in (_OPTIONS.get(name, name), name.removeprefix(f"{method}_")):
        if hasattr(config, option):
            return getattr(config, option)
    return part.file_tensors().get(name, getattr(part, "at", None) if "indices" in name else None)


# -- what a layer shows


def adapter_layer_names(host: Host) -> tuple[str, ...]:
    """The names under which the tensors of its adapters are that train."""
    kasa = any("lora_diag" in part.keys.values() for part in own_parts(host).values())
    return (*_names(host, 0), *(("lora_diag",) if kasa else ()))


def other_param_names(host: Host) -> tuple[str, ...]:
    """The names under which everything else about its adapters is."""
    return _names(host, 1)


def _names(host: Host, group: int) -> tuple[str, ...]:
    known = [LAYERS[method][group] for method in methods_at(host) if method in LAYERS]
    return tuple(dict.fromkeys(name for names in known for name in names))


def frozen_peft_weight_names(host: Host) -> dict[str, tuple[str, ...]]:
    """Tensors of adapters that never train, by adapter; here they are no parameters."""
    return {}


def in_features(host: Host) -> int | None:
    """The size of an input."""
    return _features(host)[0]


def out_features(host: Host) -> int | None:
    """The size of an output."""
    return _features(host)[1]


def _features(host: Host) -> tuple[int | None, int | None]:
    layer: Any = inside(host)
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, 3 * layer.embed_dim
    for pair in (("in_features", "out_features"), ("in_channels", "out_channels")):
        if all(hasattr(layer, name) for name in pair):
            return getattr(layer, pair[0]), getattr(layer, pair[1])
    if type(layer).__name__ == "Conv1D":
        return layer.weight.shape[0], layer.weight.shape[1]
    for _, site in _sites(host):
        return site.shape[1], site.shape[0]
    return None, None


def _sites(host: Host) -> list[tuple[Any, Any]]:
    parts = own_parts(host).values()
    keyed = [(part, key) for n in host.adapters for key, part in host.parts_of(n) if part in parts]
    return [(part, site) for part, key in keyed if (site := host.site_of(key)) is not None]


def fan_in_fan_out(host: Host) -> bool:
    """Whether the layer's weight is (in, out)."""
    return type(inside(host)).__name__ == "Conv1D"


def cast_input_dtype_enabled(host: Host) -> bool:
    """PEFT's switch; hosts cast at the border."""
    return True


def lora_variant(host: Host) -> dict[str, Any]:
    """The class of each LoRA's mathematics where it is not the plain one."""
    parts = own_parts(host) if "LORA" in methods_at(host) else {}
    return {n: type(p) for n, p in parts.items() if type(p).__name__ != "LoRA"}


def active_adapter(host: Host) -> str | list[str]:
    """The model's active adapters: a list on PEFT's layers, one name at a saved module."""
    names = list(host.switch.active)
    return names[0] if len(names) == 1 and not methods_at(host) else names


def weight(host: Host) -> Any:
    """The layer's weight; of a saved module the active copy's."""
    return getattr(_active(host), "weight")  # noqa: B009 - the attribute may be any tensor


def bias(host: Host) -> Any:
    """The layer's bias; of a saved module the active copy's."""
    return getattr(_active(host), "bias")  # noqa: B009


def _active(host: Host) -> nn.Module:
    for name in host.switch.current().active:
        for key, part in host.parts_of(name):
            if not is_own(key, part) and (module := part.instead()) is not None:
                return module
    return host.base_layer


def _active_adapter(host: Host) -> list[str]:
    return list(host.switch.active)


def _disable_adapters(host: Host) -> bool:
    return not host.switch.enabled


SEEN: tuple[Callable[[Host], Any], ...] = (
    adapter_layer_names, other_param_names, frozen_peft_weight_names, in_features, out_features,
    fan_in_fan_out, cast_input_dtype_enabled, lora_variant, active_adapter, _active_adapter,
    weight, bias, _disable_adapters,
)  # fmt: skip


# -- what a layer does


@torch.no_grad()
def get_delta_weight(host: Host, adapter: str) -> Tensor:
    """What an adapter adds to the layer's weight, in the weight's own shape."""
    part = own_parts(host).get(adapter)
    site = next((site for one, site in _sites(host) if one is part), None)
    if not isinstance(part, Additive) or site is None:
        raise AttributeError(
            f"{adapter!r} is no update that is added to the weight of {host.path}, so "
            "get_delta_weight has nothing to give"
        )
    delta: Tensor = site.from_matrix(cast(Additive, part.precise()).delta())
    return delta.to(part.dtype)


def set_scale(host: Host, adapter: str, scale: float) -> None:
    """``scale`` times alpha / r, or alpha / sqrt(r) with rsLoRA."""
    part = own_parts(host).get(adapter)
    if part is not None:
        put(part, scale * _initial(host, adapter, part))


def scale_layer(host: Host, scale: float) -> None:
    """Multiply the scale of the active adapters."""
    parts = own_parts(host)
    for name in host.switch.active if scale != 1 else ():
        if name in parts:
            put(parts[name], parts[name].scale * scale)


def unscale_layer(host: Host, scale: float | None = None) -> None:
    """Divide the scale of the active adapters; None: as it was at the start."""
    parts = own_parts(host)
    for name in host.switch.active:
        if name in parts:
            own = parts[name]
            put(own, _initial(host, name, own) if scale is None else own.scale / scale)


def _initial(host: Host, adapter: str, part: Any) -> float:
    site = next((site for one, site in _sites(host) if one is part), None)
    at = "weight" if site is None else site.parameter
    config: Any = host.switch.configs[adapter].at(host.path, at)
    alpha = getattr(config, "lora_alpha", getattr(config, "alpha", None))
    if alpha is None or (part.rank() is None and not hasattr(config, "r")):
        raise StateError(f"{config.method} has no alpha and rank of which its scale is made")
    rank = config.r
    return float(alpha) / (math.sqrt(rank) if getattr(config, "use_rslora", False) else rank)


def merge(host: Host, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Write adapters into this layer's weight; whether it is finite is always checked."""
    wanted = tuple(adapter_names) if adapter_names else host.switch.active
    held: tuple[str, ...] = host.__dict__["merged_adapters"]
    wanted = host.present(host.switch.check(wanted))
    new = tuple(n for n in wanted if n not in held)
    if not new:
        if held:
            warn("All adapters are already merged, nothing to do.", UserWarning)
        return
    if held:
        warn(
            f"Already following adapters were merged {','.join(held)}. You are now additionally "
            f"merging {','.join(new)}.",
            UserWarning,
        )
    host.commit(held + new, host.prepare(held + new), True)


def unmerge(host: Host) -> None:
    """Take the adapters out of this layer's weight again, bit for bit."""
    if not host.__dict__["merged_adapters"]:
        return warn("Already unmerged. Nothing to do.", UserWarning)
    host.restore()


def enable_adapters(host: Host, enabled: bool) -> None:
    """Switch all adapters of the model on or off; at this layer none trains while they are off."""
    host.switch.activate(enabled=enabled)
    for name in host.adapters:
        host.set_requires_grad(name, enabled and name in host.switch.active)


def _get_available_adapters(host: Host) -> set[str]:
    return set(own_parts(host))


def _move_adapter_to_device_of_base_layer(
    host: Host, adapter_name: str, device: Any = None
) -> None:
    weight = next(host.base_layer.parameters(), None)
    device = device or (None if weight is None else weight.device)
    if adapter_name in host.adapters and device is not None and device.type != "meta":
        host.adapters[adapter_name].to(device)


def get_base_weight(host: Host) -> Tensor:
    """The layer's weight."""
    weight: Tensor = host.base_layer.weight  # type: ignore[assignment]
    return weight


def set_base_weight(host: Host, weight: Tensor) -> None:
    """Write the layer's weight."""
    host.base_layer.weight.data = weight


def adapter_state_dict(
    host: Host, adapter_name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter's copy of the module, or of its rows, as a file has them."""
    state = host.state_dict() if state_dict is None else state_dict
    load = adapter_state_dict_load_map(host, adapter_name)
    return {key: state[name] for key, name in load.items() if name in state}


def adapter_state_dict_load_map(host: Host, adapter_name: str) -> dict[str, str]:
    """Name in a file -> name below the layer, of what ``adapter_state_dict`` gives."""
    copies = shape(host).children.get("modules_to_save")
    if isinstance(copies, Modules) and adapter_name in copies:
        keys = copies[adapter_name].state_dict()
        return {k: f"modules_to_save.{adapter_name}.{k}" for k in keys}
    rows = "token_adapter.trainable_tokens_delta"
    return {rows: f"{rows}.{adapter_name}"}


VERBS: Sequence[Callable[..., Any]] = (
    get_delta_weight, set_scale, scale_layer, unscale_layer, merge, unmerge, enable_adapters,
    _get_available_adapters, _move_adapter_to_device_of_base_layer, get_base_weight,
    set_base_weight, adapter_state_dict, adapter_state_dict_load_map,
)  # fmt: skip
