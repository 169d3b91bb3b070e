"""Mixture-of-experts layers of transformers 5: what used to be linear layers are stacked parameters
now.

A config in the old names (``w1``, ``gate_proj``) or ``"all-linear"`` means those parameters, as in
PEFT. Two old layers that were fused into one parameter get twice the rank there, with the scale of
one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import TargetError, warn

if TYPE_CHECKING:
    from ..targets.offer import Offer

# old name of a layer -> the parameter that it is a part of now
_W = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_PROJ = {
    "gate": "gate.weight",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
_OLD_NAMES: dict[str, dict[str, str]] = {
    **dict.fromkeys("mixtral minimax minimax_m2".split(), _W),
    **dict.fromkeys(
        "qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker "
        "qwen3_omni_moe_text deepseek_v2 deepseek_v3 deepseek_v32 dots1 afmoe ernie4_5_moe "
        "glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe longcat_flash solar_open mellum beam "
        "hunyuan_v1_moe flex_olmo olmoe exaone_moe cohere2_moe".split(),
        _PROJ,
    ),
}


def spell_out(config: Any, offer: Offer) -> None:
    """Name the stacked parameters that a config means in ``target_parameters``.

    Raises:
        TargetError: one of two layers that are fused now is named without the other.
    """
    stacked = _stacked(offer)
    wanted: Any = config.target_modules
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    old = _OLD_NAMES.get(offer.model_type)
    if not stacked or not (everything or isinstance(wanted, set)):
        return
    if old is None:
        if everything and not config.target_parameters:
            warn(
                f"'all-linear' leaves the stacked parameters {', '.join(sorted(stacked))} out; "
                "name them in target_parameters to adapt them"
            )
        return
    named = set(old) if everything else {e for e in wanted if e in old and not _is_layer(e, offer)}
    parts = {new: {o for o, n in old.items() if n == new} for new in set(old.values())}
    for new, olds in parts.items():
        if named & olds and not olds <= named:
            raise TargetError(
                f"target_modules names {sorted(named & olds)} without {sorted(olds - named)}, with "
                f"which it is fused into {new}; name both, or target_parameters=[{new!r}]"
            )
    if not named:
        return
    new_names = {old[o] for o in named}
    config.target_parameters = set(config.target_parameters or ()) | new_names
    config.target_modules = wanted if everything else wanted - named
    for new in sorted(n for n in new_names if len(parts[n]) > 1):
        key, times = rf".*\.{new}", len(parts[new])
        config.rank_pattern = {**(config.rank_pattern or {}), key: config.r * times}
        config.alpha_pattern = {**(config.alpha_pattern or {}), key: config.lora_alpha * times}


def _stacked(offer: Offer) -> set[str]:
    found = set()
    for path, module in offer.modules.items():
        for name, p in module._parameters.items():
            if p is not None and p.ndim == 3 and not offer.adaptable(path):
                found.add(f"{path.rpartition('.')[2]}.{name}")
    return found


def _is_layer(entry: str, offer: Offer) -> bool:
    return any(offer.adaptable(path) for path in offer.ending_with(entry))


def stacked_names(model_type: str) -> dict[str, str]:
    """Old name of an expert's layer -> the stacked parameter that it is a part of now, those of one
    parameter in the order of its outputs; empty for other models.
    """
    return {old: new for old, new in _OLD_NAMES.get(model_type, {}).items() if "." not in new}
