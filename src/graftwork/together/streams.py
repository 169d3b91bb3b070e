"""Random numbers of a run of its own: its dropout draws what it would draw alone.

A run's generator begins where its adapter's start has left it. Each ``nn.Dropout`` in its adapter
is replaced, while it trains, by one that draws from there, for the run's rows in their own length.
Draws by other means (whole adapters or rows of a weight left out, noise on weights) come from
torch's global generator, so they have the same distribution and other values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.adapter import Additive
from ..fast import choose
from ..fast.bits import Mask, Reading, reading


class Stream:
    """The generators of one run, and the shape of its rows in the present pass.

    Args:
        seed: of generators on other devices than the CPU.
        state: of the CPU's generator.
    """

    def __init__(self, seed: int, state: Tensor) -> None:
        self.seed = seed
        first = torch.Generator()
        first.set_state(state)
        self.generators = {torch.device("cpu"): first}
        self.rows = self.passes = 0
        self.last: Reading | None = None
        self.own: Callable[[int], slice] = partial(slice, 0)

    def begin(self, rows: int, own: Callable[[int], slice]) -> None:
        """A new pass; ``own``: which places of a sequence of this length are the run's own."""
        self.rows, self.own = rows, own
        self.passes += 1
        self.last = None

    def generator(self, device: torch.device) -> torch.Generator:
        """The one for a device."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


class Drawn(nn.Module):
    """Dropout with a run's own random numbers.

    Args:
        p: the share that is dropped.
        stream: the run's.
        pooled: it is dropout as the engine has it: of a layer's input, by windows of bits.
    """

    def __init__(self, p: float, stream: Stream, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.p, self.stream = p, (stream,)  # in a tuple: no state of the model's
        self.states: list[Tensor] = []  # before each draw of a pass, for a recomputation
        self.of = -1

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with a share of it set to zero, and the rest larger."""
        if not self.training or self.p == 0:
            return x
        stream = self.stream[0]
        n = x.shape[1] if x.ndim > 2 and len(x) == stream.rows else 0
        own = stream.own(n)
        part = x[:, own] if n else x
        kept = self.window(part) if self.pooled else self.each(part)
        if part.shape != x.shape:
            kept = F.pad(kept, (0, 0) * (x.ndim - 2) + (own.start, n - own.stop))
        return x * kept

    def each(self, x: Tensor) -> Tensor:
        """What the numbers of x are multiplied by, each drawn by itself."""
        kept = torch.empty_like(x.detach(), memory_format=torch.contiguous_format)
        return kept.bernoulli_(1 - self.p, generator=self.turn(x.device)).div_(1 - self.p)

    def window(self, x: Tensor) -> Tensor:
        """The same by the window that layers have in common which read one input in succession."""
        stream, given = self.stream[0], choose.STATE.given
        whole = given() if given is not None else None
        ones = torch.ones(x.shape, dtype=x.dtype, device=x.device).flatten(0, -2)

        def draw() -> Mask:
            return Mask.draw(self.p, ones, self.turn(torch.device("cpu")))

        stream.last = reading(stream.last, x if whole is None else whole, id(self), self.p, draw)
        return (stream.last.mask.times(ones) * (1 / (1 - self.p))).view(x.shape)

    def turn(self, device: torch.device) -> torch.Generator:
        """The generator to draw from: in a recomputation, as it was in the forward."""
        stream = self.stream[0]
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing runs it again
            again = torch.Generator(device)
            again.set_state(self.states.pop())
            return again
        if self.of != stream.passes:
            self.of, self.states = stream.passes, []
        generator = stream.generator(device)
        self.states.append(generator.get_state())
        return generator


@contextmanager
def drawing(parts: Iterable[nn.Module], stream: Stream) -> Iterator[None]:
    """Within the block the dropout in these parts draws from ``stream``."""
    changed: list[tuple[nn.Module, str, nn.Module]] = []
    for part in parts:
        for module in list(part.modules()):
            for name, child in module._modules.items():
                if type(child) is nn.Dropout and child.p > 0:
                    changed.append((module, name, child))
                    pooled = isinstance(module, Additive) and name == "dropout"
                    drawn = Drawn(child.p, stream, pooled).train(child.training)
                    module._modules[name] = drawn
    try:
        yield
    finally:
        for module, name, child in changed:
            child.train(module._modules[name].training)  # type: ignore[union-attr]
            module._modules[name] = child
