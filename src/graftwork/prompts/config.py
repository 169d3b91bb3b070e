"""What the configs of virtual tokens have in common, with PEFT's names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig, TargetConfig
from ..engine.switch import Switch
from ..errors import POLICY, StateError, warn
from ..fields import whole
from ..targets.offer import Offer, Target
from .entry import attach, detach


@dataclass
class PromptConfig(TargetConfig, peft="save"):
    """Virtual tokens.

    Args:
        num_virtual_tokens: how many; None: 20.
        token_dim: their width, as the next three by default the model's.
        num_transformer_submodules: PEFT's; 2 for encoder-decoders.
        num_attention_heads: heads of a key.
        num_layers: attentions that get keys and values.
    """

    num_virtual_tokens: int | None = whole(None)
    token_dim: int | None = whole(None)
    num_transformer_submodules: int | None = whole(None)
    num_attention_heads: int | None = whole(None)
    num_layers: int | None = whole(None)

    is_prompt_learning = True

    @property
    def n(self) -> int:
        """The number of virtual tokens."""
        return self.num_virtual_tokens or 20

    def prepare(self, offer: Offer) -> None:
        super().prepare(offer)
        for name in ("overrides", "target_parameters"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} has no meaning for {type(self).__name__}, whose virtual tokens are "
                    "one table for the whole model; leave it out"
                )
        self.num_virtual_tokens = self.n
        kind = getattr(self.task_type, "value", "")
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if kind == "SEQ_2_SEQ_LM" else 1
        for name, value in sizes_of(offer.model).items():
            if getattr(self, name) is None:
                if value is None:
                    raise ValueError(
                        f"it is not known what {name} is in a {type(offer.model).__name__}; give it"
                    )
                setattr(self, name, value)

    def positions(self, known: Collection[str]) -> int:
        """How many of a model's positions the virtual tokens take; ``known``: the arguments of its
        forward.
        """
        return self.n

    def places(self, offer: Offer, path: str) -> list[Target]:
        return [Target(path, offer.modules[path])]

    def attached(self, model: nn.Module, switch: Switch) -> None:
        attach(model, switch)

    def detached(self, model: nn.Module, switch: Switch) -> None:
        detach(model, switch)

    def combined(
        self, held: Sequence[tuple[str, Any]], weights: Sequence[float], how: str
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        from .combine import combined

        return combined(held, weights, how)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "target_modules"}


def idle(config: PromptConfig, text: str) -> None:
    """Stop where a field of an adapter that is to train has no effect.

    Raises:
        ValueError: ``text``; as PEFT, which goes on, it is only a warning.
    """
    if config.inference_mode:
        return
    if not POLICY.lenient:
        raise ValueError(text)
    warn(text)


def unmade(config: PromptConfig, plain: str) -> StateError:
    """The error where rows are to be taken that a network made, and the network is not there."""
    task = getattr(config.task_type, "value", None)
    return StateError(
        f"a {config.method} adapter that trains makes its rows by a network, and here are the rows "
        "alone. Load it with is_trainable=False; or resume from a folder that this library saved "
        "while it trained, whose training_state-*.safetensors holds the network; or train the rows "
        f"themselves: is_trainable=True, config={plain}(num_virtual_tokens={config.n}, "
        f"task_type={task!r})"
    )


NAMES = {  # what it is here -> what configs of models call it
    "num_layers": "num_hidden_layers num_layers n_layer",
    "token_dim": "hidden_size n_embd d_model",
    "num_attention_heads": "num_attention_heads n_head num_heads encoder_attention_heads",
}


def text_config(model: nn.Module) -> Any:
    """The config of a model, or of its language model."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def sizes_of(model: nn.Module) -> dict[str, int | None]:
    """The sizes that PEFT reads from a model's config."""
    config = text_config(model)
    return {
        name: next((v for n in names.split() if (v := getattr(config, n, None)) is not None), None)
        for name, names in NAMES.items()
    }
