"""What ``generate`` makes in front of the forwards, with room for virtual tokens: a cache of fixed
size that also holds them; and no masks of four axes, in which they would have no place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..engine.switch import Switch
from ..errors import StateError
from .inputs import CACHES

MASKS, CACHE = "create_masks_for_generate", "_prepare_cache_for_generation"


def as_given(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
    """A mask (rows, tokens) as it is; the model makes its own of it, as with any other cache."""
    return attention_mask


def prepare_cache(
    model: nn.Module, switch: Switch, config: Any, kwargs: dict[str, Any], *args: Any
) -> Any:
    """Let the model make its cache, longer by the virtual tokens that stand in it.

    Raises:
        StateError: it is to go on from a cache with virtual tokens, which it would count as tokens
            of the input, and leave out as many of those.
    """
    call, two = switch.current(), bool(getattr(model.config, "is_encoder_decoder", False))
    tokens = {
        name: one.n
        for name, one in switch.shared.items()
        if switch.configs[name].is_prompt_learning and not one.inside and (one.decodes or not two)
    }
    own = [tokens.get(name, 0) for name in call.rows or call.active]
    more = sum(own) if call.rows is None else max(own)
    given = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if more and given is not None and int(given.get_seq_length()):
        raise StateError(
            "generate cannot go on from a cache that holds virtual tokens, which it takes for "
            "tokens of the input: leave the cache out, or use prefix tuning, which has none in it"
        )
    *rest, length = args
    plain: Any = getattr(type(model), CACHE)
    return plain(model, config, kwargs, *rest, length + more)


def make_room(model: nn.Module, switch: Switch) -> None:
    """Let ``generate`` ask these, on a model that has it."""
    if hasattr(model, CACHE):
        model.__dict__[MASKS] = as_given
        model.__dict__[CACHE] = partial(prepare_cache, model, switch)


def leave(model: nn.Module) -> None:
    """Undo that."""
    model.__dict__.pop(MASKS, None)
    model.__dict__.pop(CACHE, None)
