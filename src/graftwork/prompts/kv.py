"""Prefixes and cartridges that start as the keys and values of a text, by PEFT's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import POLICY, StateError, warn
from .keys import Table


def layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (batch, heads, tokens, size), from a cache or tuples."""
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    try:
        return [(layer[0], layer[1]) for layer in cache]
    except (TypeError, IndexError):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; give the cache that a forward returned, "
            "or a pair (keys, values) for each layer"
        ) from None


def prompt_embeddings_from_past_key_values(
    past_key_values: Any, *, num_virtual_tokens: int
) -> Tensor:
    """The first tokens of a cache as the rows of a prefix, (n, layers x 2 x width).

    Args:
        past_key_values: a cache of one sequence.
        num_virtual_tokens: n, how many of its tokens.

    Raises:
        ValueError: it holds several sequences, fewer tokens, or layers of several shapes.
    """
    layers, n = layers_of(past_key_values), num_virtual_tokens
    if not layers:
        raise ValueError("past_key_values holds no layer; call the model with use_cache=True")
    shapes = {(len(k), *k.shape[1::2]) for pair in layers for k in pair if k is not None}
    if len(shapes) != 1 or next(iter(shapes))[0] != 1:
        raise ValueError(
            f"the keys and values are (rows, heads, size) = {sorted(shapes)}; a prefix can be made "
            "of one row, and of layers of one shape"
        )
    if (short := min(k.shape[2] for k, _ in layers)) < n:
        raise ValueError(
            f"past_key_values holds {short} tokens for {n} virtual tokens; give a longer text, or "
            "a cache that keeps all of its tokens"
        )
    every = [pair[i][0, :, :n].transpose(0, 1) for pair in layers for i in (0, 1)]
    return torch.stack(every, dim=1).flatten(1)  # each (n, heads, size)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Let a prefix or cartridge start as the first tokens of a cache; the rows that it took.

    Args:
        model: a ``PeftModel``.
        adapter_name: which adapter; the active one by default.
        past_key_values: a cache of one sequence.
        num_virtual_tokens: how many of its tokens; as many as the adapter has.

    Raises:
        ValueError: the adapter holds no keys and values, or they are made by a projection.
        StateError: the cache and the adapter have other sizes.
    """
    table = _table(model, adapter_name)
    n = table.n if num_virtual_tokens is None else num_virtual_tokens
    values = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=n)
    if values.shape != (mine := table.whole()).shape:
        raise StateError(
            f"the cache makes rows of the shape {tuple(values.shape)}, and the adapter has "
            f"{tuple(mine.shape)}: num_virtual_tokens and the model must be the adapter's"
        )
    table.put(values)
    return values


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix or cartridge start as the first tokens of a text, as the base model sees them.

    Args:
        model: a ``PeftModel``.
        tokenizer: the base model's.
        text: at least as many tokens as the adapter has.
        adapter_name: which adapter; the active one by default.
        num_virtual_tokens: how many tokens; as many as the adapter has.
        use_chat_template: whether the text is a system message, where the tokenizer can say so.
        max_length: where the text is cut.

    Raises:
        ValueError: the adapter or the text does not fit, or the chat template takes no system
            message.
    """
    _table(model, adapter_name)
    device = next(model.parameters()).device
    ids = _ids(tokenizer, text, use_chat_template)[:, :max_length].to(device)
    with model.disable_adapter():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model,
        adapter_name=adapter_name,
        past_key_values=out["cache"] if "cache" in out else out["past_key_values"],
        num_virtual_tokens=num_virtual_tokens,
    )


def _ids(tokenizer: Any, content: str, chat: bool) -> Tensor:
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": content}]
        options = {"add_generation_prompt": False, "return_dict": False, "return_tensors": "pt"}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=True, **options)  # type: ignore[no-any-return]
        except Exception as error:  # whatever a template raises that has no system message
            text = (
                f"the tokenizer's chat template takes no system message alone ({error}); give "
                "use_chat_template=False"
            )
            if not POLICY.lenient:
                raise ValueError(text) from error
            warn(f"{text}; as in PEFT, the text is read without it")
    plain: Tensor = tokenizer(content, return_tensors="pt")["input_ids"]
    return plain


def _table(model: Any, name: str | None) -> Table:
    name = model.active_adapters[0] if name is None else name
    switch = model.base_model.switch
    switch.check((name,))
    table = switch.shared.get(name)
    if not isinstance(table, Table):
        raise ValueError(
            f"{name!r} is a {switch.configs[name].method} adapter; only those with keys and values "
            "(PREFIX_TUNING, P_TUNING_V2, CARTRIDGE) can start from a text's"
        )
    if table.projects:
        raise ValueError(
            f"the keys and values of {name!r} are made by a projection, which cannot start from a "
            "text's; use prefix_projection=False"
        )
    return table
