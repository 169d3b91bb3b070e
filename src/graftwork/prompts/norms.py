"""The norms of keys, values and prompts that an adapter holds for single attentions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError
from ..files import codec
from .tokens import TokensConfig


@dataclass(frozen=True)
class LayerNorms:
    """What an adapter holds for one attention.

    Args:
        layer: which one: the place in the table of keys and values, or the path of the attention.
        norms: mean norms over the virtual tokens, of "keys" and "values"; or of the "prompt", and
            the "gate" in front of it.
    """

    layer: str
    norms: dict[str, float]


@torch.no_grad()
def prompt_norms(model: Any, adapter_name: str | None = None) -> list[LayerNorms]:
    """The norms of what a prefix, a cartridge or an adaption prompt holds for each attention.

    Args:
        model: a ``PeftModel``.
        adapter_name: which adapter; the active prompt by default.

    Raises:
        StateError: the adapter holds nothing for attentions.
    """
    name = chosen(model, adapter_name)
    config = model.peft_config[name]
    if not holds_layers(config):
        other = isinstance(config, TokensConfig)
        raise StateError(
            f"{name!r} is a {config.method} adapter and holds nothing for single attentions; "
            + ("use graftwork.nearest_tokens" if other else prompts_of(model.peft_config))
        )
    return norms_in(config, tensors_of(model, name))


def holds_layers(config: Any) -> bool:
    """Whether an adapter holds keys and values, or prompts, for single attentions."""
    prompts = config.is_prompt_learning and not isinstance(config, TokensConfig)
    return prompts or bool(config.is_adaption_prompt)


def norms_in(config: Any, tensors: Mapping[str, Tensor]) -> list[LayerNorms]:
    """What ``prompt_norms`` gives, of tensors under PEFT's names."""
    if not config.is_adaption_prompt:
        rows = tensors["prompt_embeddings"].float()
        rows = rows.reshape(len(rows), -1, 2, config.token_dim)
        pairs = rows.norm(dim=-1).mean(0).tolist()  # (layers, 2)
        return [LayerNorms(str(i), {"keys": k, "values": v}) for i, (k, v) in enumerate(pairs)]
    out = []
    for key, rows in tensors.items():
        path, _, name = key.removeprefix(codec.PREFIX).rpartition(".")
        if name == "adaption_prompt":
            gate = tensors[key.replace("adaption_prompt", "adaption_gate")].item()
            norm = rows.float().norm(dim=-1).mean().item()
            out.append(LayerNorms(path, {"prompt": norm, "gate": gate}))
    return out


def tensors_of(model: Any, name: str) -> dict[str, Tensor]:
    """What the file of an adapter would hold."""
    found = codec.state(model.get_base_model(), name)
    return {codec.full(key): tensor for key, tensor in found.items()}


def chosen(model: Any, name: str | None) -> str:
    """The adapter that is meant: the named one, or an active one, prompts first.

    Raises:
        StateError: there is none.
    """
    configs, active = model.peft_config, model.active_adapters
    if name is None:
        prompts = [n for n in active if configs[n].is_prompt_learning or holds_layers(configs[n])]
        name = next(iter([*prompts, *active]), None)
    if name is None:
        raise StateError(f"no adapter is active; give adapter_name, one of {sorted(configs)}")
    model.base_model.switch.check((name,))
    return name


def prompts_of(configs: Mapping[str, Any]) -> str:
    """Which adapters of a model are prompts, in words."""
    names = [n for n, c in configs.items() if c.is_prompt_learning or c.is_adaption_prompt]
    return f"the prompts of this model are {names}" if names else "this model has no prompt"
