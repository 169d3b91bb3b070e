"""Acts inside transformers' attention: more keys and values, or something added to the output.

An attention of transformers hands q, k and v to a function that its config names. While a host runs
it ``with acting(module, act)``, ``act`` is called in that function's place, and calls it. No cache
is involved, so it is the same in training, with gradient checkpointing, in models that have no
cache, and when generating.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import StateError

# act(function, module, q, k, v, mask, ...): what function(module, q, k, v, mask, ...) gives, and
# more; q (batch, heads, queries, size), k and v (batch, key heads, keys, size)
Act = Callable[..., Any]


class _Here(threading.local):
    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.acts: tuple[Act, ...] = ()
        self.called = False


_HERE = _Here()


def attends(module: nn.Module) -> bool:
    """Whether a module calls transformers' attention functions, or can be made to."""
    from .own import OWN, place

    if place(module) in OWN:
        return not getattr(module, "talking_head", False)  # DeBERTa's mixture of the heads' scores
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@contextmanager
def acting(module: nn.Module, act: Act) -> Iterator[None]:
    """Within the block, in this thread, ``act`` runs in the attention of ``module``.

    Raises:
        StateError: the module's own code did not come to it.
    """
    before = _HERE.module, _HERE.acts, _HERE.called
    outer = _HERE.acts if _HERE.module is module else ()
    _HERE.module, _HERE.acts, _HERE.called = module, (*outer, act), False
    try:
        yield
        called = _HERE.called
    finally:
        _HERE.module, _HERE.acts, _HERE.called = before
    if not called:
        raise StateError(
            f"this {type(module).__name__} computed without transformers' attention functions "
            "(GPT-2 does with reorder_and_upcast_attn=True and eager attention), so its adapters "
            'had no effect; use attn_implementation="sdpa"'
        )
    if before[0] is module:  # where they are nested, the outer act was called too
        _HERE.called = True


def install(module: nn.Module) -> None:
    """Make the attention functions that a module may call look for acts."""
    from transformers.modeling_utils import AttentionInterface

    from .own import OWN, as_function, place

    cls: Any = type(module)
    if place(module) in OWN:
        forward: Any = OWN[place(module)]
        if not hasattr(cls.forward, "looks"):
            cls.forward = as_function(cls.forward, forward)
        return
    for name in ("get_interface", "__getitem__"):
        plain = getattr(AttentionInterface, name, None)
        if plain is not None and not hasattr(plain, "looks"):
            setattr(AttentionInterface, name, _looking(plain))
    scope = inspect.unwrap(cls.forward).__globals__
    eager = scope.get("eager_attention_forward")
    if not hasattr(AttentionInterface, "get_interface") and not hasattr(eager, "looks"):
        scope["eager_attention_forward"] = extended(eager)  # older ones call it by this name


def _looking(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def found(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = plain(self, *args, **kwargs)
        return function if _HERE.module is None else extended(function)

    found.looks = True  # type: ignore[attr-defined]
    return found


def here(module: nn.Module) -> bool:
    """Whether something acts in the attention of this module now."""
    return _HERE.module is module and bool(_HERE.acts)


def extended(function: Any) -> Any:
    """An attention function that lets what acts here act, the last one first."""

    @functools.wraps(function)
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        acts, given = _HERE.acts, (module, query, key, value, attention_mask, *args)
        if _HERE.module is not module or not acts:
            return function(*given, **kwargs)
        _HERE.acts, _HERE.called = acts[:-1], True
        try:
            return acts[-1](attend, *given, **kwargs)
        finally:
            _HERE.acts = acts

    attend.looks = True  # type: ignore[attr-defined]
    return attend
