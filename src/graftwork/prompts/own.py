"""Attentions whose own code computes softmax(q K' + bias) V: the same, by an attention function in
which something can act.

Of DeBERTa in every version of transformers, of T5 and ModernBERT in the older ones.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import extended, here


def as_function(plain: Any, forward: Callable[..., Any]) -> Any:
    """A forward that is ``plain``, and ``forward`` where something acts in the module."""
    names = list(inspect.signature(inspect.unwrap(plain)).parameters)

    @functools.wraps(plain)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not here(self):
            return plain(self, *args, **kwargs)
        return forward(self, **dict(zip(names[1:], args, strict=False)), **kwargs)

    run.looks = True  # type: ignore[attr-defined]
    return run


def eager_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float = 1.0,
    position_bias: Tensor | None = None,
    dropout: float = 0.0,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling q K' + bias) V over the keys that ``mask`` shows, (batch, queries, ...);
    ``padding``: a mask that the bias holds already.
    """
    scores = scaling * q @ k.mT
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def compute(*args: Any, **kwargs: Any) -> Any:
    """``eager_attention`` with what acts in the module."""
    return extended(eager_attention)(*args, **kwargs)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)  # (batch, heads, tokens, size)


def deberta_v2(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q K'/sqrt(c d) + what is between contents and positions; none of that for keys in front."""
    heads = module.num_attention_heads
    x = hidden_states if query_states is None else query_states
    q = _heads(module.query_proj(x), heads)
    k = _heads(module.key_proj(hidden_states), heads)
    v = _heads(module.value_proj(hidden_states), heads)
    terms, bias = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c")), None
    if module.relative_attention:
        table = module.pos_dropout(rel_embeddings)
        flat = q.flatten(0, 1), k.flatten(0, 1)
        found = module.disentangled_attention_bias(*flat, relative_pos, table, terms)
        bias = found.view(-1, heads, *found.shape[1:]) if isinstance(found, Tensor) else None
    scaling, mask, p = (q.shape[-1] * terms) ** -0.5, attention_mask.bool(), module.dropout.p
    y, weights = compute(module, q, k, v, mask, scaling=scaling, position_bias=bias, dropout=p)
    return y, weights if output_attentions else None


def deberta(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same of the first version, which projects all three at once."""
    heads = module.num_attention_heads
    q, k, v = _heads(module.in_proj(hidden_states), heads).chunk(3, dim=-1)
    terms, bias = 1 + len(module.pos_att_type), None
    q = (q + _heads(module.q_bias[None, None], heads)) / (q.shape[-1] * terms) ** 0.5
    v = v + _heads(module.v_bias[None, None], heads)
    if module.relative_attention and rel_embeddings is not None and relative_pos is not None:
        table = module.pos_dropout(rel_embeddings)
        found = module.disentangled_att_bias(q, k, relative_pos, table, terms)
        bias = found if isinstance(found, Tensor) else None
    mask, p = attention_mask.bool(), module.dropout.p
    y, weights = compute(module, q, k, v, mask, scaling=1.0, position_bias=bias, dropout=p)
    return y, weights if output_attentions else None


def t5(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    query_length: int | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    cache_position: Tensor | None = None,
) -> tuple[Any, ...]:
    """Self-attention of a T5, whose first layer makes the position biases of all, with the mask."""
    q, k, v = (_heads(p(hidden_states), module.n_heads) for p in (module.q, module.k, module.v))
    cache = getattr(past_key_values, "self_attention_cache", past_key_values)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx, {"cache_position": cache_position})
    t = q.shape[2]
    if position_bias is None:
        if module.has_relative_attention_bias:
            length = k.shape[2] if query_length is None else query_length
            made = module.compute_bias(length, k.shape[2], q.device, cache_position=cache_position)
            position_bias = made[:, :, -t:]
        else:
            position_bias = q.new_zeros(1, module.n_heads, t, k.shape[2])
        if mask is not None:
            position_bias = position_bias + mask[..., : k.shape[2]]
    options = {"position_bias": position_bias, "dropout": module.dropout, "padding": mask}
    y, weights = compute(module, q, k, v, None, scaling=1.0, **options)
    out = (module.o(y), position_bias)
    return (*out, weights) if output_attentions else out


def modernbert(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    output_attentions: bool = False,
    attention_mask: Tensor | None = None,
    sliding_window_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """ModernBERT's, without its packing of the tokens, which flash attention asks for."""
    turn = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
    qkv = module.Wqkv(hidden_states).unflatten(-1, (3, module.num_heads, module.head_dim))
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (batch, heads, tokens, size)
    q, k = turn(q, k, *position_embeddings)
    mask = attention_mask if module.local_attention == (-1, -1) else sliding_window_mask
    options = {"scaling": module.head_dim**-0.5, "dropout": module.attention_dropout}
    y, weights = compute(module, q, k, v, mask, **options)
    y = module.out_drop(module.Wo(y))
    return (y, weights) if output_attentions else (y,)


def place(module: nn.Module) -> tuple[str, bool]:
    """The class of a module, and whether its code uses transformers' attention functions."""
    cls = type(module)
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    uses = code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}", uses


OWN = {
    ("modeling_deberta_v2.DisentangledSelfAttention", False): deberta_v2,
    ("modeling_deberta.DisentangledSelfAttention", False): deberta,
    ("modeling_t5.T5Attention", False): t5,
    ("modeling_modernbert.ModernBertAttention", False): modernbert,
}
