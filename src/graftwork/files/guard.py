"""Building an adapter that a file describes: no more memory than its tensors and the model explain,
and an error that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..config import PeftConfig
from ..engine.tree import parameters
from ..errors import FileError, GraftworkError

ROOM = 1 << 24  # numbers that any adapter may need
TIMES = 4  # what an adapter may need for each number of its file and of the model
EACH = 256  # what making a tensor costs at the least, in numbers


@contextmanager
def described(
    config: PeftConfig, model: nn.Module, tensors: Mapping[str, Tensor], where: object
) -> Iterator[None]:
    """A block in which an adapter is built by a config out of a file.

    Args:
        config: the config.
        model: the base model.
        tensors: what the file holds.
        where: the file, for messages.

    Raises:
        FileError: the config asks for far more than the file holds, or for what cannot be built.
    """
    axes = [n for t in tensors.values() for n in t.shape]
    mode: Any = nullcontext()
    if any(n > max(axes, default=0) for n in _wholes(config.to_dict())):  # no size, or no true one
        held = sum(t.numel() for t in tensors.values())
        held += sum(p.numel() for _, p in parameters(model))
        mode = _Bounded(ROOM + TIMES * held, f"{where}: its config")
    try:
        with mode:
            yield
    except GraftworkError:
        raise
    except Exception as error:  # what does not fit shows in any of many ways
        text = str(error)[:2000]
        if not isinstance(error, ValueError):  # PyTorch's have a stack behind them
            text = f"{type(error).__name__}: {text}".partition("\n")[0]
        raise FileError(f"{where}: its config cannot be used with this model: {text}") from error


def _wholes(value: Any) -> Iterator[int]:
    """Every whole number in a config."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _wholes(one)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from _wholes(one)


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is made, before it is made."""

    def __init__(self, left: int, who: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.who = left, who

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        making = not any(isinstance(one, Tensor) for one in args)
        self.left -= EACH
        if making or name.startswith(("new_", "repeat")):
            self.left -= _asked(args)
        if self.left < 0:
            raise FileError(
                f"{self.who} asks for far larger tensors than the file holds; it is damaged or "
                "hostile"
            )
        return func(*args, **(kwargs or {}))


def _asked(args: Iterable[Any]) -> int:
    """How many numbers are asked for: the product of a list, or the largest number itself."""
    sizes = [math.prod(map(abs, one)) for one in args if isinstance(one, (list, tuple)) and
             all(isinstance(n, int) for n in one)]  # fmt: skip
    plain = [abs(int(one)) for one in args if isinstance(one, (int, float)) and math.isfinite(one)]
    return max([*sizes, *plain], default=0)
