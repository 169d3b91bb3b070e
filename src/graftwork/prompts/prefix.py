"""Prefix tuning (arXiv 2101.00190): in every attention softmax(q [P_k; K]') [P_v; V], P_k and P_v
trained, or W_2 tanh(W_1 E) of a small table E, whose product a file holds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from ..engine import Adapter, Host, Shared
from ..errors import TargetError, warn
from ..fields import choice, whole
from ..targets.offer import Offer
from .config import PromptConfig, sizes_of, text_config
from .inputs import counts_keys
from .keys import Prefix, Table
from .layers import numbers, self_attentions, shape_of, source_of

# with "zero" all virtual tokens get the same gradient, and stay one another's copies
SCALES = {None: 1.0, "zero": 0.0, "small": 0.02}


@dataclass
class PrefixConfig(PromptConfig):
    """Keys and values in front of those of the tokens, in every layer."""

    TABLE: ClassVar[type[Table]] = Table  # what holds them
    COMBINES = "keys and values"
    ENCODER: ClassVar[bool] = False  # whether an encoder in front of a decoder gets some too

    hidden = 0  # the width of what they are made by; 0: they train themselves
    scale = 1.0  # what their start, drawn from a standard normal, is multiplied by

    def prepare(self, offer: Offer) -> None:
        given, paths = self.token_dim, self_attentions(offer, self.ENCODER)
        known, index = sizes_of(offer.model)["num_layers"] or 0, numbers(paths, offer)
        most = max(known, index[-1] + 1)  # of encoder-decoders PEFT knows the encoder's alone
        self.num_layers = self.num_layers or most
        super().prepare(offer)
        if self.num_layers > most:
            raise TargetError(
                f"num_layers={self.num_layers}, and a {type(offer.model).__name__} has {most} "
                "attentions for keys and values; leave num_layers out"
            )
        self.size(offer, paths, given)
        self.layout = self.places_in(offer, paths, index)
        self.first = paths[0] in self.layout  # by the first layer's cache PEFT counts positions
        if self.target_modules not in (None, set(self.layout)):
            raise TargetError(
                f"{type(self).__name__} puts keys and values into every attention; leave "
                "target_modules out"
            )

    def size(self, offer: Offer, paths: list[str], given: int | None) -> None:
        """Settle ``token_dim`` and ``num_attention_heads`` as those of the keys, as PEFT does: of
        layers that differ those with the largest heads count.
        """
        text, shapes = text_config(offer.model), [shape_of(offer.modules[p]) for p in paths]
        values = text.to_dict() if hasattr(text, "to_dict") else {}  # what layers have in common
        heads = values.get("num_key_value_heads")
        if heads is not None:
            size = values.get("head_dim")
            size = size or (self.token_dim or 1) // (self.num_attention_heads or 1)
            every = [(heads, size), *(shape for shape in shapes if shape is not None)]
        elif given is None and shapes[0] is not None:
            every = [shapes[0]]
        else:
            return
        heads, size = max(every, key=lambda shape: shape[1])
        self.token_dim, self.num_attention_heads = heads * size, heads

    def places_in(self, offer: Offer, paths: list[str], index: list[int]) -> dict[str, int]:
        """Path of an attention -> its place in the table."""
        heads = self.num_attention_heads or 1
        size = (self.token_dim or 1) // heads
        shapes = {path: shape_of(offer.modules[path]) or (heads, size) for path in paths}
        vary, layout, left = len(set(shapes.values())) > 1, {}, []
        for i, (path, (own, each)) in enumerate(shapes.items()):
            if not vary and (own, each) != (heads, size):
                raise TargetError(
                    f"token_dim={self.token_dim} and num_attention_heads={heads} make keys of "
                    f"{heads} heads of {size}, and {path} has {own} of {each}; leave both out"
                )
            if own > heads or each > size:
                left.append(f"{path} ({own} heads of {each})")
            elif (i := index[source_of(paths, i, offer)]) < (self.num_layers or 0):
                layout[path] = self.place(i)
        if left:
            warn(
                f"keys of {heads} heads of {size} do not fit {len(left)} of {len(shapes)} "
                f"attentions, {left[0]} among them, which get none, as in PEFT"
            )
        return layout

    def positions(self, known: Collection[str]) -> int:
        return self.n if counts_keys(known) else 0

    def place(self, i: int) -> int:
        """The place of the i-th attention; PEFT repeats the table for an encoder-decoder, and takes
        every other place.
        """
        two = self.num_transformer_submodules == 2
        return 2 * i % (self.num_layers or 1) if two else i

    def usual(self, offer: Offer) -> Any:
        return set(self.layout)

    def share(self, sites: Any) -> Shared:
        return self.TABLE(self)

    def build(self, host: Host, key: str, shared: Any) -> Adapter:
        return Prefix(self, host, shared)


@dataclass
class PrefixTuningConfig(PrefixConfig, method="PREFIX_TUNING"):
    """Trained keys and values in front of those of the tokens, in every layer."""

    init_weights: str | None = choice(None, "zero", "small")  # None: normal; small: 2 % of it
    encoder_hidden_size: int | None = whole(None)  # of the projection; None: token_dim
    prefix_projection: bool = False  # they are made from a small table by two layers

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    @property
    def hidden(self) -> int:  # type: ignore[override]
        return (self.encoder_hidden_size or 0) if self.prefix_projection else 0

    @property
    def scale(self) -> float:  # type: ignore[override]
        return SCALES[self.init_weights]
