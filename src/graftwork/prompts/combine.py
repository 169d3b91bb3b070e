"""Several prompts as one: their rows one behind the other, or a weighted sum of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StateError, did_you_mean
from ..fast.shards import in_parts, parts_in
from ..fast.tensors import steady
from .config import PromptConfig
from .keys import Table
from .prefix import PrefixTuningConfig
from .tasks import MultitaskPromptTuningConfig, Tasks
from .tokens import PromptTuningConfig

HOWS = ("cat", "linear")
KEPT = {f.name for f in fields(PromptConfig)} - {"peft_type", "target_modules"}
KEPT |= {"num_frozen_tokens"}

Held = Sequence[tuple[str, Any]]  # each adapter's name, and what it shares


def combined(held: Held, weights: Sequence[float], how: str) -> tuple[Any, dict[str, Tensor]]:
    """One prompt instead of several of a kind: its config, and what its file holds.

    Args:
        held: the prompts.
        weights: one for each.
        how: "cat": all rows, one behind the other, which is as all active at once; "linear": the
            weighted sum of the rows.

    Raises:
        StateError: these have no such combination.
    """
    _check(held, weights, how)
    if parted := parts_in([one for _, one in held]):
        raise in_parts("a prompt", parted, "combined")
    counts = {len(one.u) if isinstance(one, Tasks) else 0 for _, one in held}
    if how == "cat" and len(counts) == 1 and max(counts) > 1:
        return _of_tasks(held)
    with steady([one for _, one in held]):
        rows = [one.whole().unflatten(0, (-1, one.n)) for _, one in held]  # (stacks, n, width)
    if how == "linear":
        made = sum(w * row.to(torch.promote_types(row.dtype, torch.float32))
                   for w, row in zip(weights, rows, strict=True))  # fmt: skip
    else:
        made = torch.cat(rows, dim=1)
    assert isinstance(made, Tensor)
    kind, first = _kind(held), held[0][1].config
    given = {f.name: getattr(first, f.name) for f in fields(kind) if f.name in KEPT}
    config = kind(**given | {"num_virtual_tokens": made.shape[1], "inference_mode": True})
    tensors = {"prompt_embeddings": made.flatten(0, 1)}
    if kind is MultitaskPromptTuningConfig:  # of one task, which changes nothing
        ones = made.new_ones(1, len(tensors["prompt_embeddings"]), made.shape[2])
        tensors |= {Tasks.keys["u"]: ones[..., :1], Tasks.keys["v"]: ones[:, :1]}
    return config, tensors


def _of_tasks(held: Held) -> tuple[Any, dict[str, Tensor]]:
    """Multitask prompts of as many tasks, one behind the other; their ranks add up, since the rows
    of one have nothing of the other's factors.
    """
    every, first = [one for _, one in held], held[0][1].config
    ranks = [one.u.shape[-1] for one in every]
    rows = torch.cat([one.E.unflatten(0, (-1, one.n)) for one in every], dim=1)
    parts = []
    for i, one in enumerate(every):
        around = sum(ranks[:i]), sum(ranks[i + 1 :])
        parts.append(F.pad(one.u.unflatten(1, (-1, one.n)), around))
    config = replace(
        first, num_virtual_tokens=rows.shape[1], num_ranks=sum(ranks), inference_mode=True
    )
    return config, {
        "prompt_embeddings": rows.flatten(0, 1),
        Tasks.keys["u"]: torch.cat(parts, dim=2).flatten(1, 2),
        Tasks.keys["v"]: torch.cat([one.v for one in every], dim=1),
    }


def _check(held: Held, weights: Sequence[float], how: str) -> None:
    names, both = [name for name, _ in held], "use 'cat', all rows one behind the other"
    if how not in HOWS:
        raise StateError(
            f"combination_type={how!r} is not known for prompts{did_you_mean(how, HOWS)}; they are "
            f"rows, and no updates of weights: {both}, or 'linear', the weighted sum of the rows"
        )
    if how == "cat" and set(weights) != {1}:
        raise StateError(
            f"the weights {list(weights)} have no meaning with 'cat', which puts the rows of "
            f"{names} behind each other as they are: give 1 for each, or use 'linear'"
        )
    lengths = {name: one.n for name, one in held}
    if how == "linear" and len(set(lengths.values())) > 1:
        raise StateError(f"a sum needs prompts of one length, and these have {lengths}: {both}")
    first, alike = held[0], _alike(held[0][1])
    for name, one in held:
        for what, value in _alike(one).items():
            if value != alike[what]:
                raise StateError(
                    f"{first[0]!r} and {name!r} differ in {what}, so they cannot be one adapter; "
                    f"make both active instead: set_adapter({[first[0], name]})"
                )


def _alike(one: Any) -> dict[str, Any]:
    """What must be the same in prompts that are combined."""
    config = one.config
    if isinstance(one, Table):
        names = ["num_attention_heads", "token_dim"]
        more = {"the attentions that read them": config.layout}
    else:
        names = ["num_transformer_submodules"]
        more = {"whether a decoder's tokens get some": one.decodes}
    return {**{name: getattr(config, name) for name in names}, **more}


def _kind(held: Held) -> Any:
    """The class of the config: that of a plain prompt which does the same."""
    first, kinds = held[0][1], {type(one.config) for _, one in held}
    if not isinstance(first, Table):
        return MultitaskPromptTuningConfig if first.decodes else PromptTuningConfig
    return kinds.pop() if len(kinds) == 1 else PrefixTuningConfig
