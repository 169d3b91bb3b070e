"""Blocks below the lowest adapter give the same for a sample in every epoch: computed once, kept.

Which blocks those are is found in one forward, from what autograd says. A stack is a list of
modules, each of which is given what the one before it gave, and its frozen part ends where a
gradient is needed. Before training all samples run through that part once. Then its first block
hands out what was kept, and the others hand it on: masks, positions and the rest of the model stay
the model's.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inject import switch_of
from ..engine.tree import inside, walk
from ..errors import TrainingError
from ..loss.fused import plain_model
from . import base
from .recipe import RecipeError
from .samples import Samples, in_batches

GB = 10**9
FILE = "prefix.bin"


@dataclass(frozen=True)
class Prefix:
    """The frozen blocks at a model's start.

    Args:
        path: where their list is in the model.
        count: how many of them are frozen, one or more.
        every: how many the list has.
        within: whether a block gives a tuple with its states in it.
        width: of the states.
        dtype: of the states.
        tokens: of all samples.
    """

    path: str
    count: int
    every: int
    within: bool
    width: int
    dtype: torch.dtype
    tokens: int

    @property
    def size(self) -> int:
        """Bytes of what is kept."""
        return self.tokens * self.width * self.dtype.itemsize


class _ReachedError(Exception):
    """The forward came to the first block above the frozen ones."""


def blocks_of(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks of a stack, as they stand in the model."""
    found: Any = dict(walk(plain_model(model)))[path]
    return list(inside(found).children())


def find(model: Any, samples: Samples, pad: int) -> Prefix:
    """The frozen blocks of a model in training mode.

    Args:
        model: with its adapters.
        samples: those to train on.
        pad: the padding token.

    Raises:
        RecipeError: there are none, or what they give is not the same every time.
    """
    inner = plain_model(model)
    switch = switch_of(inner)
    prompts = [n for n in switch.active if switch.configs[n].is_prompt_learning] if switch else []
    if prompts:
        raise refused(
            f"the adapter {prompts[0]!r} puts virtual tokens in front of the lowest block"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise refused(
            f"{type(inner).__name__} has two stacks of blocks, an encoder's and a decoder's"
        )
    chosen = [samples[i] for i in range(min(2, len(samples)))]
    [(_, batch)] = in_batches(Samples(chosen), len(chosen), pad)
    with torch.random.fork_rng():
        path, runs = _stack(model, batch)
        count = next((i for i, (_, out) in enumerate(runs) if _state(out).requires_grad), len(runs))
        if not count or _state(runs[0][0]).requires_grad:
            raise refused(f"the lowest of {path} is adapted, or something below it is")
        if count == len(runs):
            raise refused(f"nothing in {path} is adapted")
        given = runs[count - 1][1]
        _need_sameness(model, batch, path, count)
    state, tokens = _state(given), sum(samples.lengths())
    within = not isinstance(given, Tensor)
    return Prefix(path, count, len(runs), within, state.shape[-1], state.dtype, tokens)


def refused(reason: str) -> RecipeError:
    """The error of a prefix that cannot be kept."""
    return RecipeError(
        f"--cache-prefix: {reason}. It keeps what the blocks below the lowest adapter give; adapt "
        "the upper ones alone, as in --layers-to-transform 10,11, or leave it out"
    )


def _state(given: Any) -> Tensor:
    """The hidden states in what a block is given or gives."""
    if isinstance(given, tuple) and len(given) == 1:
        given = given[0]
    if not isinstance(given, Tensor):
        raise refused(f"a block gives more than its states ({type(given).__name__})")
    return given


def _stack(model: Any, batch: dict[str, Tensor]) -> tuple[str, list[tuple[Tensor, Any]]]:
    """The longest stack, and what each of its blocks was given and gave.

    Raises:
        RecipeError: there is none.
    """
    every = {p: inside(m) for p, m in walk(plain_model(model))}
    lists = {p: m for p, m in every.items() if isinstance(m, nn.ModuleList) and len(m) > 1}
    seen: dict[str, list[tuple[int, Tensor, Any]]] = {path: [] for path in lists}
    hooks = []

    def watch(path: str, number: int) -> Callable[..., None]:
        def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            seen[path].append((number, x, out))

        return after

    for path, blocks in lists.items():
        for i, block in enumerate(blocks.children()):
            hooks.append(block.register_forward_hook(watch(path, i), with_kwargs=True))
    try:
        model.train()
        model(**{key: tensor.to(model.device) for key, tensor in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    found = {path: runs for path, runs in seen.items() if _follow(runs, len(lists[path]))}
    if not found:
        raise refused(f"{type(plain_model(model)).__name__} has no stack of blocks in a row")
    path = max(found, key=lambda p: len(found[p]))
    return path, [(x, out) for _, x, out in found[path]]


def _follow(runs: list[tuple[int, Any, Any]], count: int) -> bool:
    """Whether each block ran once, on what the one before it gave."""
    if [number for number, _, _ in runs] != list(range(count)):
        return False
    outs = [out[0] if isinstance(out, tuple) else out for _, _, out in runs]
    return all(x is out for (_, x, _), out in zip(runs[1:], outs, strict=False))


@torch.no_grad()
def _run(model: Any, batch: dict[str, Tensor], path: str, count: int) -> Tensor:
    """What the first ``count`` blocks give (batch, longest, width)."""
    found: list[Tensor] = []

    def reached(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    hook = blocks_of(model, path)[count].register_forward_pre_hook(reached, with_kwargs=True)
    batch = {k: t.to(model.device) for k, t in batch.items() if k != "labels"}
    try:
        model(**batch)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]


def _need_sameness(model: Any, batch: dict[str, Tensor], path: str, count: int) -> None:
    """Stop where the blocks, run again with other random numbers, give something else."""
    config = plain_model(model).config
    if skipped := [k for k in ("layerdrop", "encoder_layerdrop") if getattr(config, k, 0)]:
        raise refused(f"blocks below it are left out at random ({skipped[0]})")
    torch.manual_seed(1)
    once = _run(model, batch, path, count)
    torch.manual_seed(2)
    again = _run(model, batch, path, count)
    if not torch.allclose(once, again, rtol=1e-5, atol=1e-6):
        raise refused("dropout is on below it, so its states differ every time; --base-dropout 0")


class Cache:
    """The states of all samples.

    Args:
        prefix: the blocks.
        samples: the samples.
        most: bytes that may be held in memory; more goes into a file.
        folder: where that file goes.

    Raises:
        TrainingError: the disk has no room for it.
    """

    def __init__(self, prefix: Prefix, samples: Samples, most: int, folder: Path) -> None:
        self.prefix, self.samples, self.checked = prefix, samples, False
        self.starts, total = [], 0
        for length in samples.lengths():
            self.starts.append(total)
            total += length
        self.file = None if prefix.size <= most else folder / FILE
        shape, numbers = (total, prefix.width), total * prefix.width
        if self.file is None:
            self.states = torch.empty(shape, dtype=prefix.dtype)
            return
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < prefix.size:
            raise TrainingError(
                f"--cache-prefix needs {prefix.size / GB:.1f} GB, more than it may hold in memory "
                f"({most / GB:.1f} GB, --cache-prefix-gb), and {folder} has {free / GB:.1f} GB "
                "free; "
                "train on fewer --samples, or leave it out"
            )
        whole = torch.from_file(str(self.file), shared=True, size=numbers, dtype=prefix.dtype)
        self.states = whole.view(shape)

    def close(self) -> None:
        """Remove the file."""
        if self.file is not None:
            self.states = torch.empty(0)
            self.file.unlink(missing_ok=True)

    def place(self, row: int) -> slice:
        """Where the states of a sample are."""
        start = self.starts[row]
        return slice(start, start + len(self.samples[row].ids))

    def fill(self, model: Any, size: int, pad: int) -> None:
        """Run all samples through the frozen blocks, ``size`` at a time."""
        model.train()
        for rows, batch in in_batches(self.samples, size, pad):
            found = _run(model, batch, self.prefix.path, self.prefix.count).cpu()
            for row, states in zip(rows, found, strict=True):
                at = self.place(row)
                self.states[at] = states[: at.stop - at.start]

    def read(self, rows: Sequence[int], packed: bool) -> Tensor:
        """The states of samples (batch, longest, width), or in one row (1, tokens, width)."""
        each = [self.states[self.place(row)] for row in rows]
        if packed:
            return torch.cat(each)[None]
        return nn.utils.rnn.pad_sequence(each, batch_first=True)

    @contextmanager
    def used(self, model: Any, rows: Tensor, packed: bool) -> Iterator[None]:
        """Within the block a forward begins at the first block above the frozen ones."""
        states = self.read(rows.tolist(), packed).to(model.device)
        within = self.prefix.within
        blocks = blocks_of(model, self.prefix.path)[: self.prefix.count]

        def first(*args: Any, **kwargs: Any) -> Any:
            return (states,) if within else states

        def other(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return (x,) if within else x

        before = [block.__dict__.get("forward") for block in blocks]
        try:
            for i, block in enumerate(blocks):
                block.__dict__["forward"] = other if i else first
            yield
        finally:
            for block, old in zip(blocks, before, strict=True):
                block.__dict__.pop("forward")
                if old is not None:
                    block.__dict__["forward"] = old

    @torch.no_grad()
    def check(self, model: Any, batch: dict[str, Any], rows: Tensor, packed: bool) -> None:
        """Compare a batch's loss with that of a whole forward, in training mode.

        Raises:
            TrainingError: they differ.
        """
        model.train()
        losses, self.checked = [], True
        for kept in (False, True):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                if kept:
                    with self.used(model, rows, packed):
                        losses.append(float(model(**batch).loss))
                else:
                    losses.append(float(model(**batch).loss))
        near = base.rounding(model)
        if not math.isclose(*losses, rel_tol=near, abs_tol=near):
            raise TrainingError(
                f"--cache-prefix: from the kept states the loss is {losses[1]:.6g}, and computed "
                f"as a whole {losses[0]:.6g}; something in the blocks above {self.prefix.path}."
                f"{self.prefix.count - 1} depends on more than those states. Leave it out"
            )
