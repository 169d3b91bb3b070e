"""Whether something watches each operation, so that none may be hidden in a larger one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.plain = False


STATE = _Thread()


@contextmanager
def plain_path() -> Iterator[None]:
    """Within the block, in this thread, adapters compute by the plain formulas of their methods."""
    before, STATE.plain = STATE.plain, True
    try:
        yield
    finally:
        STATE.plain = before


def watched(x: Tensor) -> bool:
    """Whether the plain path is asked for, or has to be taken."""
    return STATE.plain or traced(x)


def traced(x: Tensor) -> bool:
    """Whether a compiler, a transform or a subclass of tensors has to see each operation."""
    return (
        type(x) not in PLAIN
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
