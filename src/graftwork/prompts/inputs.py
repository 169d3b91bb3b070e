"""The inputs of a model whose prompts are active: rows of an embedding in front of the tokens', and
everything that goes by position: mask, positions, token types, labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.switch import Call
from ..errors import StateError
from .order import Order, Own, counts, rows_of, two_axes
from .positions import PLACES, first_of, tables_of

CACHES = ("cache", "past_key_values")


class Inputs:
    """The arguments of one forward: what is known, what is given, and whose tokens they are."""

    def __init__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], part: str = ""
    ) -> None:
        self.module, self.part = module, part
        self.known = list(inspect.signature(module.forward).parameters)
        self.given: dict[str, Any] = {**dict(zip(self.known, args, strict=False)), **kwargs}
        self.front = front = "decoder_" if part == "both" else ""
        self.mask, self.positions = f"{front}attention_mask", f"{front}position_ids"
        self.x: Tensor | None = self.get(f"{front}input_ids", f"{front}inputs_embeds")
        cache = self.get(*CACHES)
        self.past = 0 if cache is None else int(cache.get_seq_length())

    def get(self, *names: str) -> Any:
        """The first of these arguments that is given."""
        return next((self.given[n] for n in names if self.given.get(n) is not None), None)

    def enter(self, call: Call, shared: dict[str, Any]) -> None:
        """Make room for the virtual tokens of a call; ``shared``: what each prompt holds."""
        tokens = {n: s for n, s in shared.items() if not s.inside}
        keys = {n: s for n, s in shared.items() if s.inside and s.moves and self.moves()}
        if self.part == "both":  # the encoder's hook puts the tokens there
            self.look_through(tokens, call)
            tokens = {name: one for name, one in tokens.items() if one.decodes}
            if tokens and self.x is None and (labels := self.get("labels")) is not None:
                model: Any = self.module  # it would make them itself, without the virtual tokens
                self.x = model.prepare_decoder_input_ids_from_labels(labels=labels)
        if self.x is None:
            return
        if tokens:
            self.lengthen(tokens, call)
        self.count(counts(keys, call, self.x).each)

    def moves(self) -> bool:
        """Whether tokens stand behind keys in front of them, as in PEFT, where those are a cache;
        tokens of other models, and of an encoder in front of a decoder, keep their positions.
        """
        return self.part != "encoder" and counts_keys(self.known)

    def lengthen(self, tokens: dict[str, Any], call: Call) -> None:
        """Put the virtual tokens among the others, behind the padding on their left."""
        x, mask = self.x, self.given.get(self.mask)
        assert x is not None
        self.need_no_loss(tokens, call)
        own = counts(tokens, call, x)
        order = self.order(own)
        self.need_room(order.n)
        if mask is not None or not own.even:
            self.given[self.mask] = order.mask
        if (given := self.get(self.positions)) is not None:
            first = (torch.arange(order.n, device=x.device) - order.n + own.each).clamp(min=0)
            first = first + first_of(self.module)
            self.given[self.positions] = (
                given + own.each if self.past else order.join(first, given + own.each)
            )
        if (steps := self.get("cache_position")) is not None:  # of older transformers
            more = torch.arange(len(steps), len(steps) + order.n, device=steps.device)
            self.given["cache_position"] = (
                steps + order.n if self.past else torch.cat([steps, more])
            )
        if self.past:
            return
        one = next(iter(tokens.values()))
        embeds = x if x.is_floating_point() else one.embed(x)
        first = rows_of(tokens, call, order.n, embeds, bool(self.front))
        self.look_up(order)
        self.given.pop(f"{self.front}input_ids", None)
        self.given[f"{self.front}inputs_embeds"] = self.x = order.join(first, embeds)
        for name, value in (("token_type_ids", 0), ("labels", -100)):
            old = self.given.get(name)  # labels of a whole row may be as many, if they are floats
            if old is not None and old.shape[:2] == x.shape[:2] and not old.is_floating_point():
                self.given[name] = order.join(old.new_full((len(x), order.n), value), old)
        for name in ("start_positions", "end_positions"):
            if (old := self.given.get(name)) is not None:
                self.given[name] = order.moved(old)

    def look_up(self, order: Order) -> None:
        """What Gemma looks up by ids in other tables, for each layer; a virtual token is no token,
        as what stands for a picture.
        """
        tables: Any = [m for m in self.module.modules() if hasattr(m, "get_per_layer_inputs")]
        ids = self.get("input_ids")
        if not tables or ids is None or not tables[-1].config.hidden_size_per_layer_input:
            return
        ids = order.join(ids.new_zeros(len(ids), order.n), ids)
        self.given["per_layer_inputs"] = tables[-1].get_per_layer_inputs(ids)

    def order(self, own: Own) -> Order:
        """Where the tokens go that ``own`` virtual ones join."""
        x, mask = self.x, self.given.get(self.mask)
        assert x is not None
        if mask is None:
            seen = x.shape[1] + max(0, self.past - own.most)
            base = torch.ones(len(x), seen, dtype=torch.long, device=x.device)
        else:
            base = two_axes(mask)
            others = self.past - own.most + x.shape[1]
            told = self.get("cache_position") is not None  # older ones count keys that are not zero
            if self.past and not told and base.shape[1] != others:
                raise StateError(
                    f"{self.mask} is over {base.shape[1]} tokens; it must be over {others}: those "
                    f"in the cache, without {own.most} virtual ones, and {x.shape[1]} new ones"
                )
        return Order(own, base, 0 if self.past else x.shape[1], pools_last(self.module))

    def need_room(self, n: int) -> None:
        """Stop where a cache of fixed size is too small for n virtual tokens too.

        Raises:
            StateError: it is.
        """
        assert self.x is not None
        cache = self.get(*CACHES)
        layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
        sizes = [one.max_cache_len for one in layers if is_fixed(one)]
        needed = self.past + self.x.shape[1] + (0 if self.past else n)
        if sizes and needed > min(sizes):
            raise StateError(
                f"the cache has room for {min(sizes)} tokens, and {needed} are to be in it, {n} "
                f"virtual ones among them: give it max_cache_len={needed} or more"
            )

    def need_no_loss(self, tokens: dict[str, Any], call: Call) -> None:
        """Stop where rows of a mixed batch would need a loss of their own.

        Raises:
            StateError: they would.
        """
        weighing = [name for name, one in tokens.items() if one.weighs]
        if weighing and call.rows is not None and self.get("labels") is not None:
            raise StateError(
                f"{weighing[0]!r} weighs the tokens of the loss, and a mixed batch has one for all "
                "its rows; leave labels out, or run one adapter at a time"
            )

    def look_through(self, tokens: dict[str, Any], call: Call) -> None:
        """The mask of the encoder's output, for the decoder."""
        mask, x = self.given.get("attention_mask"), self.get("input_ids", "inputs_embeds")
        if not tokens or (mask is None and x is None):
            return
        own = counts(tokens, call, x if mask is None else mask)
        made = self.get("encoder_outputs")
        if made is not None and mask is not None and mask.shape[1] + own.most != made[0].shape[1]:
            raise StateError(
                f"attention_mask is over {mask.shape[1]} tokens, and the encoder's output over "
                f"{made[0].shape[1]}, {own.most} virtual ones among them. prefill_chunk_size cuts "
                "this mask, which is the encoder's: leave it out"
            )
        if mask is None:
            if own.even:
                return
            mask = torch.ones(*x.shape[:2], dtype=torch.long, device=x.device)
        self.given["attention_mask"] = Order(own, two_axes(mask), 0).mask

    def count(self, before: Tensor) -> None:
        """The positions, from behind ``before`` (rows, 1) keys and by what the mask counts."""
        assert self.x is not None
        tables = [] if self.positions in self.known else self.tables()
        if self.positions not in self.known and not tables:
            return
        given, mask, length = self.get(self.positions), self.get(self.mask), self.x.shape[1]
        if given is None:
            if isinstance(mask, Tensor) and mask.ndim == 2:
                given = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                given = (torch.arange(length, device=self.x.device) + self.past)[None]
            given = given + first_of(self.module)
        if tables:
            PLACES.at.update({id(table): given + before for table in tables})
        else:
            self.given[self.positions] = given + before

    def tables(self) -> list[nn.Module]:
        """The tables of positions of a model whose forward does not take them."""
        inner: Any = self.module
        return tables_of(inner.get_decoder() if self.part == "both" else inner)


def counts_keys(known: Collection[str]) -> bool:
    """Whether a model, whose forward has these arguments, counts its tokens from behind a cache."""
    return any(name in known for name in CACHES)


def is_fixed(layer: Any) -> bool:
    """Whether a layer of a cache has room for so many tokens and no more."""
    return hasattr(layer, "max_cache_len") and not layer.is_sliding


def pools_last(module: nn.Module) -> bool:
    """Whether a classifier looks for the last token of a row in ``input_ids``, and takes the last
    place of all where it gets embeddings instead.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "last_non_pad_token" in code.co_varnames
