"""Within ``fused_loss(model)`` a causal language model of transformers computes its loss from the
hidden states in front of its output layer.

Nothing is known of the architecture: the output layer is made to hand its input on, and the model's
loss function to look for it. Where that very tensor arrives, nothing was done to the logits between
the two, so the loss of both is one function; where another arrives (softcapping, a scale), or none,
the model is run as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..engine.host import Host
from ..engine.inject import switch_of
from ..engine.root import Grafted
from ..engine.tree import inside
from ..errors import StateError
from ..hooks import Hooks
from .parts import TOLD, loss_of

CHANGES = {  # fields of configs that change the logits -> values that leave them as they are
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
}


class _ChangedError(Exception):
    """The loss function was given something else than the output layer gave."""


class FusedLoss:
    """How the losses within the block are computed.

    Args:
        reason: why they are computed from whole logits; empty where they are not.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason, self.kernel = reason, ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"from whole logits: {self.reason}"
        return f"{TOLD[self.kernel]}, without whole logits" if self.kernel else "not computed yet"


def plain_model(model: Any) -> Any:
    """The user's model within graftwork's and torch's wrappers."""
    while True:
        model, before = inside(model), model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, Grafted):
            model = model.model
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if model is before:
            return model


def why_not(model: nn.Module) -> str:
    """Why a model's loss cannot be had without its logits, as far as it shows; or nothing."""
    inner: Any = plain_model(model)
    kind, head = type(inner).__name__, None
    if hasattr(inner, "get_output_embeddings") and hasattr(inner, "loss_function"):
        head = inner.get_output_embeddings()
    if head is None:
        return f"{kind} is no language model of transformers with an output layer"
    from transformers.loss.loss_utils import ForCausalLMLoss

    config = inner.config.get_text_config()
    if inner.config.is_encoder_decoder or inner.loss_function is not ForCausalLMLoss:
        return f"the loss of {kind} is not that of causal language models"
    for name, plain in CHANGES.items():
        if (value := getattr(config, name, None)) not in plain:
            return f"{kind} changes its logits before the loss ({name}={value})"
    if compiled(model):
        return f"{kind} is compiled"
    return _why_not_head(head) or _why_not_adapters(model)


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs the model."""
    return any(
        "_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) is not None
        for m in (model, plain_model(model))
    )


def _why_not_head(head: nn.Module) -> str:
    if isinstance(head, Host):
        return "the output layer has an adapter"
    kind, weight = type(head), type(head.weight)
    if kind is not nn.Linear:
        return f"the output layer is a {kind.__module__}.{kind.__name__}"
    if weight not in (Tensor, nn.Parameter):
        return f"the output layer's weight is a {weight.__name__}"
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    if hooks or head._backward_pre_hooks or "forward" in head.__dict__:
        return "something is hooked to the output layer"
    return ""


def _why_not_adapters(model: nn.Module) -> str:
    switch = switch_of(plain_model(model))
    for name, config in switch.configs.items() if switch is not None else ():
        if type(config).after is not Hooks.after:
            return f"the adapter {name!r} computes a loss of its own from the logits"
    return ""


class Way:
    """What stands for a model's forward, for its output layer's, and for its loss function."""

    def __init__(self, model: nn.Module, how: FusedLoss, fallback: bool) -> None:
        self.model: Any = plain_model(model)
        self.how, self.fallback = how, fallback
        self.head: Any = self.model.get_output_embeddings()
        self.forward: Callable[..., Any] = self.model.forward
        self.on = False
        self.given: Tensor | None = None  # what the output layer gave
        self.used = False
        known = list(inspect.signature(self.forward).parameters)
        self.place = known.index("labels") if "labels" in known else len(known)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        labels = args[self.place] if len(args) > self.place else kwargs.get("labels")
        if labels is None or self.how.reason:
            return self.forward(*args, **kwargs)
        self.on, self.given, self.used = True, None, False
        failed: Exception | None = None
        try:
            outputs = self.forward(*args, **kwargs)
            if self.used:
                return without(outputs, self.given)
        except _ChangedError:
            pass
        except Exception as error:
            if self.given is None or self.used:  # it is the model's own
                raise
            failed = error  # shown with the refusal; a fallback would meet it again
        finally:
            self.on, self.given = False, None
        name = type(self.model).__name__
        reason = f"{name} does not hand what its output layer gives to its loss function"
        if not self.fallback:
            raise StateError(refusal(reason)) from failed
        self.how.reason = reason
        return self.forward(*args, **kwargs)

    def hand_on(self, x: Tensor) -> Tensor:
        """The output layer's forward."""
        if not self.on:
            return nn.Linear.forward(self.head, x)
        self.given = x.view_as(x)
        return self.given

    def loss(
        self, logits: Any, labels: Any, vocab_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The model's loss function, with the arguments of transformers' own."""
        if not self.on:
            from transformers.loss.loss_utils import ForCausalLMLoss

            return ForCausalLMLoss(logits, labels, vocab_size, *args, **kwargs)  # type: ignore[no-any-return]
        weight: Tensor = self.head.weight
        given = self.given
        if given is None or logits is not given or vocab_size not in (None, len(weight)) or args:
            raise _ChangedError
        targets = kwargs.get("shift_labels")
        if targets is None:  # a token predicts the next one
            end = kwargs.get("ignore_index", -100)
            targets = nn.functional.pad(labels, (0, 1), value=end)[..., 1:]
        self.used = True
        count = kwargs.get("num_items_in_batch")
        loss, self.how.kernel = loss_of(given, weight, self.head.bias, targets, count)
        return loss


def without(outputs: Any, given: Any) -> Any:
    """A model's outputs with None in the place of the logits, which are not there."""
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return replace(outputs, logits=None)
    return tuple(None if one is given else one for one in outputs)


def refusal(reason: str) -> str:
    """The error's text."""
    return (
        f"the loss cannot be computed without whole logits: {reason}. Leave fused_loss out, or "
        "allow it with fused_loss(model, fallback=True)"
    )


@contextmanager
def fused_loss(model: nn.Module, fallback: bool = False) -> Iterator[FusedLoss]:
    """Within the block, a causal language model given ``labels`` computes its loss without whole
    logits, the largest tensor of a step; its output's ``logits`` are None then.

    The loss is the model's own, ``num_items_in_batch`` included, up to rounding. A second backward
    pass through it, and a gradient of its gradient, are not possible. A forward without labels is
    as ever.

    Args:
        model: with adapters or without, but none at its output layer.
        fallback: compute it from the logits where the model does not allow it, instead of an error.

    Raises:
        StateError: the model does not allow it, and ``fallback`` is False.
    """
    outer = getattr(getattr(plain_model(model), "_loss_function", None), "__self__", None)
    if isinstance(outer, Way):
        yield outer.how
        return
    how = FusedLoss(why_not(model))
    if how.reason:
        if not fallback:
            raise StateError(refusal(how.reason))
        yield how
        return
    way = Way(model, how, fallback)
    places: list[tuple[nn.Module, str, Callable[..., Any]]] = [
        (way.model, "forward", named_as(way.forward, way.run)),
        (way.model, "_loss_function", way.loss),
        (way.head, "forward", way.hand_on),
    ]
    before = [(m, name, m.__dict__[name]) for m, name, _ in places if name in m.__dict__]
    try:
        for module, name, function in places:
            module.__dict__[name] = function
        yield how
    finally:
        for module, name, _ in places:
            module.__dict__.pop(name, None)
        for module, name, old in before:
            module.__dict__[name] = old


def named_as(plain: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the signature that others look for."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    return forward
