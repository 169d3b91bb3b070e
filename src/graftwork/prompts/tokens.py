"""Prompt tuning (arXiv 2104.08691): the model reads [E; x], rows E that train in front of the
embeddings x of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Adapter, Beneath, Host, Shared, Site
from ..engine.switch import Switch
from ..errors import TargetError
from ..fields import choice
from ..targets.offer import Offer
from . import visual
from .config import PromptConfig, idle
from .generating import make_room
from .starts import STARTS


class Tokens(Shared):
    """E (total, width); of an encoder-decoder's the first half stands in front of the encoder's
    tokens, as in PEFT, and the second is not read where ``decodes`` is not set.
    """

    E: Tensor
    keys = {"E": "prompt_embeddings"}
    inside = False
    decodes = False  # whether the decoder's tokens get some too
    weighs = False  # whether it has a loss of its own

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__()
        self.config, self.n = config, config.n
        self.host: tuple[Any] = (site.host,)  # in a tuple: referred to, not owned
        if site.shape[0] != config.token_dim:
            raise ValueError(
                f"token_dim={config.token_dim}, and {site.path} gives {site.shape[0]} numbers for "
                "a token; leave token_dim out"
            )
        total = config.n * config.num_transformer_submodules
        self.E = nn.Parameter(torch.empty(total, config.token_dim))

    @property
    def table(self) -> Any:
        """The model's own embedding."""
        return self.host[0].base_layer

    def start(self) -> None:
        self.E.copy_(torch.empty(self.E.shape, device="cpu").normal_())  # PEFT draws them always
        kind = getattr(self.config, "prompt_tuning_init", None)
        if kind in STARTS and not self.config.inference_mode:
            self.E.copy_(STARTS[kind](self))

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens, as the model now has them."""
        return self.host[0](ids)  # type: ignore[no-any-return]

    def rows(self, context: dict[str, Any], batch: int) -> Tensor:
        """All virtual tokens, (1 or batch, total, width)."""
        return self.whole()[None]

    def whole(self) -> Tensor:
        """The rows that do the same without what makes them, (total, width)."""
        return self.E

    def tokens(self, context: dict[str, Any], batch: int, decoder: bool) -> Tensor:
        """The virtual tokens in front of one sequence, (1 or batch, n, width)."""
        every = self.rows(context, batch)
        return every[:, self.n :] if decoder else every[:, : self.n]


class Prompt(Adapter):
    """At the input embedding, which it leaves as it is: the model's inputs are longer."""

    FORBIDS = {"merge": "it adds tokens to the input, which no weight holds"}

    def forward(self, x: Tensor, layer: Beneath) -> Tensor:
        return layer(x)

    def delta_norm(self, w: Tensor) -> float:
        return float("nan")


@dataclass
class TokensConfig(PromptConfig):
    """Virtual tokens that are embeddings."""

    EMBEDDINGS = True
    COMBINES = "virtual tokens"
    MADE = Tokens  # what holds them

    stage = None  # of a model that sees pictures, where they enter

    def prepare(self, offer: Offer) -> None:
        self.stage = visual.stage(offer)
        if self.stage and self.MADE is not Tokens:
            raise TargetError(
                f"{self.method} is about tokens, and a {type(offer.model).__name__} sees pictures; "
                "use PromptTuningConfig or PrefixTuningConfig"
            )
        if self.token_dim is None:  # some models widen their embeddings behind the table
            table = offer.modules.get(offer.first_embedding() or "")
            self.token_dim = getattr(table, "embedding_dim", None)
        super().prepare(offer)

    def usual(self, offer: Offer) -> Any:
        return visual.places(offer, self.stage) if self.stage else super().usual(offer)

    def share(self, sites: Sequence[Site]) -> Shared:
        if self.stage:
            return visual.Rows(self)
        if len(sites) > 1:
            raise TargetError(
                f"virtual tokens stand in front of what one embedding gives, and target_modules "
                f"names {sites[0].path} and {len(sites) - 1} more; leave it out"
            )
        return self.MADE(self, sites[0])

    def build(self, host: Host, key: str, shared: Any) -> Adapter:
        return visual.part(self, host, shared) if self.stage else super().build(host, key, shared)

    def adapter(self) -> type[Adapter]:
        return Prompt

    def attached(self, model: nn.Module, switch: Switch) -> None:
        super().attached(model, switch)
        if not self.stage:
            make_room(model, switch)


@dataclass
class PromptTuningConfig(TokensConfig, method="PROMPT_TUNING"):
    """Trained rows in front of the tokens' embeddings."""

    prompt_tuning_init: str = choice("RANDOM", "TEXT", "SAMPLE_VOCAB", "LABELS")  # where they start
    prompt_tuning_init_text: str | None = None  # of "TEXT"
    tokenizer_name_or_path: str | None = None  # of "TEXT" and "LABELS"
    tokenizer_kwargs: dict[str, Any] | None = None  # of "TEXT" and "LABELS"
    prompt_tuning_init_labels: list[str] | None = None  # of "LABELS": the text of each label

    BEYOND = PromptConfig.BEYOND | {"prompt_tuning_init_labels"}

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        given = {"TEXT": "prompt_tuning_init_text", "LABELS": "prompt_tuning_init_labels"}
        for name in ("tokenizer_name_or_path", given.get(kind)) if kind in given else ():
            if not getattr(self, str(name)):
                raise ValueError(f"prompt_tuning_init={kind!r} needs {name}, which is not set")
        if self.tokenizer_kwargs and kind not in given:
            raise ValueError(
                f"tokenizer_kwargs is of prompt_tuning_init='TEXT' and 'LABELS', not of {kind!r}; "
                "leave it out"
            )
        for other, name in given.items():
            if getattr(self, name) and kind != other:
                idle(self, f"{name} has no effect with prompt_tuning_init={kind!r}; {other!r} uses "
                     "it")  # fmt: skip
