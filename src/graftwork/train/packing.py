"""A batch in one row, without padding: every layer but attention computes on the tokens that are
there. Positions begin anew with each sample, and attention sees the samples one below the other,
padded as they would have been: its cost grows with the square of a row.

Whether a model can do that is found out by trying: the losses of some tokens, packed and padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.inject import switch_of
from ..engine.tree import hosts
from ..hooks import Hooks
from ..loss.fused import compiled, plain_model
from .samples import IGNORED, Sample, Samples, collate

NAME = "graftwork_packed"
OURS = ("eager", "sdpa")  # others know of packed rows themselves
WORTH = 0.05  # of the tokens: below, moving them about costs what padding does
TRIED = 4  # samples, by which packing is tried
TOKENS = 32  # of each


def pack(batch: Sequence[Sample]) -> dict[str, Tensor]:
    """Tensors ``input_ids``, ``position_ids`` and ``labels`` (1, tokens), and ``lengths`` (batch,).

    Args:
        batch: samples with a label for each token; the first of a sample is predicted by none.
    """
    labels = [np.concatenate([[IGNORED], np.asarray(s.labels)[1:]]) for s in batch]
    rows = {
        "input_ids": [s.ids for s in batch],
        "position_ids": [np.arange(len(s.ids)) for s in batch],
        "labels": labels,
    }
    out = {k: torch.from_numpy(np.concatenate(v).astype(np.int64))[None] for k, v in rows.items()}
    return {**out, "lengths": torch.tensor([len(s.ids) for s in batch])}


class _Spread(torch.autograd.Function):
    """Rows (tokens, ...) -> (places, ...), zeros where none goes; ``to`` (tokens,): the places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(to)
        return x.new_zeros(places, *x.shape[1:]).index_copy_(0, to, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _GATHER(g, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """Rows (places, ...) -> (tokens, ...), back from where ``_Spread`` put them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor) -> Tensor:
        ctx.save_for_backward(to)
        ctx.places = len(x)
        return x.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _SPREAD(g, ctx.saved_tensors[0], ctx.places), None


_SPREAD: Any = _Spread.apply
_GATHER: Any = _Gather.apply


class Rows:
    """Where the tokens of a packed row are in the padded batch.

    Args:
        lengths: tokens of each sample (batch,).
        device: where the model computes.
    """

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        sizes = lengths.tolist()
        self.batch, self.longest = len(sizes), max(sizes)
        places = [i * self.longest + np.arange(n) for i, n in enumerate(sizes)]
        self.to = torch.from_numpy(np.concatenate(places)).to(device)
        self.lengths = lengths.to(device)
        self.starts = (lengths.cumsum(0) - lengths).to(device)

    def spread(self, x: Tensor) -> Tensor:
        """(1, heads, tokens, size) -> (batch, heads, longest, size)."""
        rows: Tensor = _SPREAD(x[0].transpose(0, 1), self.to, self.batch * self.longest)
        return rows.view(self.batch, self.longest, *rows.shape[1:]).transpose(1, 2)

    def gather(self, y: Tensor) -> Tensor:
        """(batch, longest, heads, size) -> (1, tokens, heads, size)."""
        rows: Tensor = _GATHER(y.flatten(0, 1), self.to)
        return rows[None]

    def mask(self, allowed: Callable[..., Tensor], tokens: int) -> Tensor | None:
        """What each token sees (batch, 1, longest, longest), from ``allowed`` over the packed row;
        None where that is every token before it. Padding sees something too, as a softmax must.
        """
        at = torch.arange(self.longest, device=self.to.device)
        start, length = self.starts[:, None, None, None], self.lengths[:, None, None, None]
        q, k = at[None, None, :, None], at[None, None, None]
        zero = torch.zeros_like(start)
        clamp = {"max": tokens - 1}
        seen = allowed(zero, zero, (start + q).clamp(**clamp), (start + k).clamp(**clamp))
        before = (k <= q).expand(self.batch, 1, -1, -1)
        seen = torch.where(q < length, seen & (k < length), before)
        return None if torch.equal(seen, before) else seen


class _Now:
    """The packed row that a model computes; backward passes in other threads see it too."""

    rows: Rows | None = None
    plain: dict[int, str] = {}  # id of a config -> the attention that it names


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **more: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers that runs another one on the padded batch."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rows = _Now.rows
    assert rows is not None
    q, k, v = (rows.spread(x) for x in (query, key, value))
    every = list(_Now.plain.values())
    name = _Now.plain.get(id(getattr(module, "config", None)), every[0])
    if name == "eager":
        function = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        if mask is None:
            mask = torch.ones(rows.longest, rows.longest, device=q.device).tril().bool()[None, None]
        mask = torch.zeros((), dtype=q.dtype, device=q.device).where(mask, torch.finfo(q.dtype).min)
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    return rows.gather(function(module, q, k, v, mask, *args, **more)[0]), None


def _mask(*, q_length: int, mask_function: Callable[..., Tensor], **more: Any) -> Tensor | None:
    """A mask function of transformers, for ``_attend``."""
    assert _Now.rows is not None
    return _Now.rows.mask(mask_function, q_length)


@contextmanager
def packed(model: Any, lengths: Tensor) -> Iterator[None]:
    """Within the block a model computes, and repeats in the backward pass, one packed row.

    Args:
        model: the model.
        lengths: tokens of each sample (batch,).
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    ours = [c for c in configs.values() if getattr(c, "_attn_implementation", None) in OURS]
    if not ours:
        yield
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    before = [(c, c._attn_implementation) for c in ours]
    _Now.rows, _Now.plain = Rows(lengths, model.device), {id(c): name for c, name in before}
    try:
        for config in ours:
            config._attn_implementation = NAME
        yield
    finally:
        _Now.rows = None
        for config, name in before:
            config._attn_implementation = name


def saved(samples: Samples, order: Sequence[int], size: int) -> float:
    """The share of an epoch's tokens that is padding.

    Args:
        samples: the samples.
        order: in which they come.
        size: samples in a batch.
    """
    lengths = samples.lengths()
    batches = [[lengths[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def why_not(model: Any, samples: Samples, pad: int) -> str:
    """Why a model's batches cannot be packed; or nothing.

    Args:
        model: with its adapters.
        samples: those to train on, some of which are tried.
        pad: the padding token.
    """
    inner: Any = plain_model(model)
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} takes no position_ids"
    if compiled(model):
        return f"{type(inner).__name__} is compiled"
    return _why_not_adapters(inner) or _tried(model, samples, pad)


def _why_not_adapters(inner: nn.Module) -> str:
    """What an adapter does must be the same for each token, whatever stands in its row."""
    switch = switch_of(inner)
    for name, config in switch.configs.items() if switch is not None else ():
        if config.is_prompt_learning:
            return f"the adapter {name!r} puts virtual tokens in front of each row"
        if config.prepares() or config.CONTEXT or type(config).after is not Hooks.after:
            if "alora" in str(config.CONTEXT) and not getattr(config, "alora_invocation_tokens", 0):
                continue
            return f"the adapter {name!r} treats rows by what is in them"
    for path, host in hosts(inner).items():
        for part in host.parts(tuple(host.adapters)):
            if part.inside or part.together:
                return f"the adapter at {path} sees a row as a whole"
    return ""


@torch.no_grad()
def _tried(model: Any, samples: Samples, pad: int) -> str:
    """Why the losses of tokens in some samples, packed, differ from those of the padded samples."""
    chosen = sorted({len(samples) * i // TRIED for i in range(TRIED)})
    batch = [short(samples[i], TOKENS - 5 * n) for n, i in enumerate(chosen)]
    training = model.training
    model.eval()
    real = pack(batch)
    lengths = real.pop("lengths")
    try:
        want = _losses(model, collate(batch, pad))
        try:
            with packed(model, lengths):
                found = _losses(model, real)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            text = str(error).strip().splitlines()
            return f"{type(error).__name__} on trying: {text[0][:120] if text else ''}"
    finally:
        model.train(training)
    if not len(want):
        return ""
    off = (want - found).abs()
    exact = model.dtype == torch.float32
    same = off.max() <= 1e-4 if exact else off.max() <= 0.5 and off.mean() <= 0.03
    return "" if same else f"the losses of tokens differ by {off.max():.2g}"


def short(sample: Sample, most: int = TOKENS) -> Sample:
    """The first tokens of a sample, all of which are learnt."""
    return Sample(sample.ids[:most], sample.ids[:most])


def _losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each token, in the order of the samples, in the model's own precision."""
    batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    with torch.autocast(model.device.type, enabled=False):
        logits = model(**batch).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses[labels != IGNORED]
