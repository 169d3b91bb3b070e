"""Context-aware prompt tuning (arXiv 2410.17222): the model reads [E + D; x], E the embeddings of
examples and frozen, each row of D in a ball; the loss is also over the labels in the examples, of
earlier ones with less weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine import Adapter, Site
from ..errors import StateError
from ..fields import choice, not_negative, positive
from .config import idle
from .cpt_loss import with_loss
from .starts import embedded
from .tokens import Tokens, TokensConfig

if TYPE_CHECKING:
    from ..engine.root import Grafted


class Context(Tokens):
    """E and D (n, width), and how far each row may go (n, 1)."""

    radius: Tensor
    weighs = True

    def __init__(self, config: CPTConfig, site: Site) -> None:
        super().__init__(config, site)
        self.resumes = not config.inference_mode
        width = config.token_dim or 1
        del self.E
        self.D = nn.Parameter(torch.zeros(config.n, width))
        rows = embedded(self, config.ids) if self.resumes else torch.zeros(config.n, width)
        self.register_buffer("E", rows)
        self.register_buffer("radius", config.radii(width), persistent=False)

    def start(self) -> None:
        self.D.zero_()

    def whole(self) -> Tensor:
        return self.E + self.D * (self.radius > 0)

    @torch.no_grad()
    def project(self) -> None:
        """Put rows of D that left their ball on its surface."""
        norm = self.D.norm(dim=1, keepdim=True).clamp(min=torch.finfo(self.D.dtype).tiny)
        self.D.mul_((self.radius / norm).clamp(max=1))

    def file_tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.whole()}

    def take(self, tensors: Any, config: Any) -> None:
        rows = tensors["prompt_embeddings"]
        if not self.resumes:
            self.E.copy_(rows)
            self.D.zero_()
            return
        far = rows.to(self.E) - self.E
        if bool((far.norm(dim=1, keepdim=True) > 1.001 * self.radius + 1e-4).any()):
            raise StateError(
                "rows of this CPT adapter are farther from the embeddings of cpt_token_ids than "
                "training lets them go, so it was trained on another base model; load it with "
                "is_trainable=False"
            )
        self.D.copy_(far)


@dataclass
class CPTConfig(TokensConfig, method="CPT"):
    """Tokens of examples in front of the others, whose embeddings move a little.

    Args:
        cpt_token_ids: the tokens of the examples; None: one token 0.
        cpt_mask: PEFT's, which does not read it; all ones.
        cpt_tokens_type_mask: what each token is: 1, 2, 3, 4 the template, input, template and label
            of the first example, 5 to 8 those of the second, ...; 0 nothing; None: all 1.
        opt_weighted_loss_type: "decay": the labels of each example count less than those behind it.
        opt_loss_decay_factor: how much less.
        opt_projection_epsilon: how far the rows of inputs may go, times the root of width / 2048.
        opt_projection_format_epsilon: the same for templates; labels stay.
        tokenizer_name_or_path: PEFT's note of the tokenizer.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str = choice("none", "decay")
    opt_loss_decay_factor: float = positive(1.0)
    opt_projection_epsilon: float = not_negative(0.1)
    opt_projection_format_epsilon: float = not_negative(0.1)
    tokenizer_name_or_path: str | None = None

    CONTEXT = ("input_type_mask",)
    MADE = Context

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.task_type, "value", None) != "CAUSAL_LM":
            raise ValueError(
                "CPT weighs the loss of a causal language model: give task_type='CAUSAL_LM', not "
                f"{getattr(self.task_type, 'value', None)!r}"
            )
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        n = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            given = getattr(self, name)
            setattr(self, name, [1] * n if given is None else list(given))
            if len(getattr(self, name)) != n or not n:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries and cpt_token_ids {n}; give "
                    "one for each token"
                )
        if min(self.types) < 0:
            raise ValueError("cpt_tokens_type_mask holds a number below 0; 0 is no part of any")
        if set(self.cpt_mask or ()) != {1}:
            idle(self, "cpt_mask has no effect: leave tokens out of cpt_token_ids instead")
        if self.opt_loss_decay_factor != 1 and self.opt_weighted_loss_type == "none":
            idle(self, "opt_loss_decay_factor is of opt_weighted_loss_type='decay'")

    @property
    def ids(self) -> list[int]:
        """The tokens of the examples."""
        return self.cpt_token_ids or []

    @property
    def types(self) -> list[int]:
        """What each of them is."""
        return self.cpt_tokens_type_mask or []

    def radii(self, width: int) -> Tensor:
        """How far each row may go, (n, 1)."""
        form = self.opt_projection_format_epsilon
        far = torch.tensor([0.0, form, self.opt_projection_epsilon, form])
        return far[torch.tensor(self.types) % 4, None] * torch.tensor(width / 2048).sqrt()

    def after_step(self, adapters: Mapping[str, Adapter], step: int) -> None:
        next(iter(adapters.values())).shared.project()

    def after(self, root: Grafted, name: str, outputs: Any, args: Any, kwargs: Any) -> Any:
        return with_loss(self, root, outputs, args, kwargs)
