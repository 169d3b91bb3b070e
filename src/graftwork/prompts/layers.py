"""The attentions of a model in which keys and values can stand in front, and their shapes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import TargetError
from ..targets.offer import Offer
from .attention import attends
from .config import text_config

Shape = tuple[int, int]  # key heads, size of each
HEADS = "num_key_value_heads num_heads n_heads num_attention_heads".split()
SIZES = "head_dim attention_head_size key_value_proj_dim".split()


def self_attentions(offer: Offer, encoder: bool = False) -> list[str]:
    """The attentions over a model's own tokens, in its order; of an encoder-decoder those of the
    decoder, or with ``encoder`` those of the encoder and then the decoder's; of a model with
    images and text those of the text.

    Raises:
        TargetError: there is none that is known.
    """
    text, model = text_config(offer.model), offer.model
    found = [path for path, m in offer.modules.items() if attends(m) and not crosses(path, m)]
    if text is not getattr(model, "config", None):
        found = [p for p in found if type(config_of(offer.modules[p], text)) is type(text)]
    if is_encoder_decoder(model):
        stacks = [model.get_decoder()]  # type: ignore[operator]
        stacks = [model.get_encoder(), *stacks] if encoder else stacks  # type: ignore[operator]
        inner = [{id(m) for m in stack.modules()} for stack in stacks]
        found = [p for ids in inner for p in found if id(offer.modules[p]) in ids]
    if not found:
        raise TargetError(
            f"no attention of a {type(model).__name__} calls transformers' attention functions, so "
            "nothing can be put into it; use prompt tuning, or a LoRA"
        )
    return found


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has two stacks, each with tokens of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def crosses(path: str, module: nn.Module) -> bool:
    """Whether an attention looks at another sequence."""
    name = f"{'.'.join(path.split('.')[-2:])} {type(module).__name__}".lower()
    return any(word in name for word in ("cross", "encdec", "encoder_attn"))


def config_of(module: nn.Module, default: Any) -> Any:
    """The config that an attention keeps."""
    return getattr(module, "config", default)


def shape_of(module: nn.Module) -> Shape | None:
    """The shape of an attention's keys; None where its attributes do not tell."""
    config = config_of(module, None)
    groups = getattr(module, "num_key_value_groups", None)
    if groups is not None:  # the same head of keys serves several heads of queries
        heads = getattr(config, "num_attention_heads", None)
        heads = None if heads is None else heads // groups
    else:
        owners = (module, config)
        heads = next((getattr(o, n) for n in HEADS for o in owners if hasattr(o, n)), None)
    size = next((getattr(module, name) for name in SIZES if hasattr(module, name)), None)
    return None if heads is None or size is None else (heads, size)


def source_of(paths: list[str], i: int, offer: Offer) -> int:
    """Whose keys and values the i-th attention reads: those of an earlier one, or its own."""
    module: Any = offer.modules[paths[i]]
    if not getattr(module, "is_kv_shared_layer", False):
        return i
    if (index := getattr(module, "kv_shared_layer_index", None)) is not None:
        return int(index)
    kinds = config_of(module, None).layer_types
    own = [j for j in range(i) if not getattr(offer.modules[paths[j]], "is_kv_shared_layer", False)]
    return max(j for j in own if kinds[j] == kinds[i])


def numbers(paths: list[str], offer: Offer) -> list[int]:
    """The number of each attention: its layer's, as a cache counts, or its own of two stacks."""
    own = [getattr(offer.modules[path], "layer_idx", None) for path in paths]
    known = [i for i in own if i is not None]
    return known if len(known) == len(paths) and known == sorted(set(known)) else [*range(len(own))]
