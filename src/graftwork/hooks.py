"""What a method may do beside its adapters: around each forward of the model, and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import StateError
from .types import OwnType

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .config import PeftConfig
    from .engine.root import Grafted
    from .engine.switch import Switch


UPDATES = "updates of weights"


class Hooks:
    """Base of every config; a method overrides what it needs."""

    OFFERS: ClassVar[frozenset[str]] = frozenset()  # what the model offers; see ``offer``

    COMBINES: ClassVar[str] = UPDATES  # what of an adapter is combined with others

    LASTS: ClassVar[bool] = False  # what ``before`` finds in a prompt holds while it is continued

    def prepares(self) -> bool:
        """Whether ``before`` finds anything."""
        return type(self).before is not Hooks.before

    def before(self, root: Grafted, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        """Values for the adapters called ``name`` in one forward of the model, from its inputs."""
        return {}

    def after(self, root: Grafted, name: str, outputs: Any, args: Any, kwargs: Any) -> Any:
        """The outputs of such a forward, with what the method adds to them."""
        return outputs

    def offer(self, root: Grafted, name: str, attribute: str) -> Any:
        """What the model shows as an attribute in OFFERS: that of the ``Shared``."""
        return getattr(root.switch.shared[name], attribute)

    def attached(self, model: nn.Module, switch: Switch) -> None:
        """Called when an adapter is in place."""

    def detached(self, model: nn.Module, switch: Switch) -> None:
        """Called when it is gone."""

    def found(self, source: Any) -> dict[str, Tensor]:
        """Called with where its file is, if any; tensors of the adapter that stand elsewhere."""
        return {}

    def folders(self, model: Any, name: str) -> dict[str, tuple[PeftConfig, dict[str, Tensor]]]:
        """What is saved in folders within the adapter's."""
        return {}

    def for_peft(
        self, model: Any, tensors: dict[str, Tensor]
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """The config and the tensors of a file that PEFT reads, where its own is none.

        Raises:
            ValueError: there is no such file.
        """
        config: Any = self
        if isinstance(config.peft_type, OwnType):
            raise ValueError(
                f"PEFT has no method {config.method} and none that does the same, so it cannot "
                "read such an adapter; leave compat out"
            )
        return config, tensors

    def combined(
        self, held: Sequence[tuple[str, Any]], weights: Sequence[float], how: str
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """One adapter instead of several, where COMBINES is not UPDATES: its config, and what is
        at the root of its file; ``held``: each one's name and ``Shared``.
        """
        raise NotImplementedError

    def fill(self, model: Any, name: str) -> None:
        """Give an adapter that is in place the values of such folders."""


def need_all(who: str, kwargs: Mapping[str, Any]) -> None:
    """Stop where a forward sees a part of the sequence only, and what came before is in a cache.

    Raises:
        StateError: it does.
    """
    for name in ("past_key_values", "cache", "cache_params"):
        if kwargs.get(name) is not None:
            raise StateError(
                f"{who} sees the whole sequence in each forward: call the model with "
                f"use_cache=False and without {name}"
            )
