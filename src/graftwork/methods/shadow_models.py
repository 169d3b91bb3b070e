"""Where the small model of ShadowPEFT comes from, and the loss of its answers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.hub import Source

if TYPE_CHECKING:
    from .shadow import ShadowConfig

PROJECTED = "causal_lm_with_hidden_projection"  # a checkpoint that brings its projection along


def mirror(config: ShadowConfig, stack: Any) -> tuple[nn.Module, None]:
    """A smaller model of the same kind as a stack of blocks."""
    small = copy.deepcopy(stack.config)
    small.num_hidden_layers = config.shadow_num_hidden_layers or 1
    _set(small, config.shadow_hidden_size, "hidden_size")
    _set(small, config.shadow_intermediate_size, "intermediate_size", "ffn_dim", "n_inner")
    _set(small, config.shadow_num_attention_heads, "num_attention_heads")
    if kinds := getattr(small, "layer_types", None):
        n = small.num_hidden_layers
        small.layer_types = [*kinds, *[kinds[-1]] * n][:n]
    if (window := getattr(small, "max_window_layers", None)) is not None:
        small.max_window_layers = min(window, small.num_hidden_layers)
    return type(stack)(small), None


def _set(config: Any, value: int | None, *names: str) -> None:
    if value is not None:
        found = next((name for name in names if hasattr(config, name)), None)
        if found is None:
            raise ValueError(f"a {type(config).__name__} has no {names[0]}; leave it out")
        setattr(config, found, value)


def pretrained(where: str) -> tuple[nn.Module, nn.Linear | None]:
    """A trained model, and its projection to a larger one's width, where it has that."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    source = Source(where)
    raw = json.loads(Path(source.need("config.json")).read_text(encoding="utf-8"))
    if raw.get("model_type") != PROJECTED:
        model: nn.Module = AutoModel.from_pretrained(where)
        return model, None
    inner = dict(raw["shadow_model_config"])
    model = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    tensors = load_file(source.need("model.safetensors"))
    front = "shadow_model."
    own = {k.removeprefix(front): t for k, t in tensors.items() if k.startswith(front)}
    model.load_state_dict(own)
    weight = tensors["shadow_hidden_projection.weight"]
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight.copy_(weight)
    return model, projection


def frozen(module: nn.Module) -> None:
    """Make a module's parameters buffers, which nothing that unfreezes an adapter finds."""
    for name, p in list(module._parameters.items()):
        if p is not None:
            delattr(module, name)
            module.register_buffer(name, p.data)


def last_of(s: Tensor, mask: Tensor | None) -> Tensor:
    """The hidden state of each row's last token that is no padding."""
    rows = torch.arange(len(s), device=s.device)
    if mask is None:
        return s[:, -1]
    return s[rows, (mask.ne(0) * torch.arange(s.shape[1], device=s.device)).argmax(-1)]


def loss_of(logits: Tensor, labels: Tensor, lm: bool) -> Tensor:
    """The loss of a language model, or of a classifier as transformers has it."""
    labels = labels.to(logits.device)
    if lm:
        return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels.flatten())
