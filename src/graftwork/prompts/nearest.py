"""What virtual tokens are near to: tokens of the vocabulary, by the cosine between embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from .norms import chosen, holds_layers, prompts_of, tensors_of
from .tasks import MultitaskPromptTuningConfig, Tasks
from .tokens import Tokens, TokensConfig

CHUNK = 8192  # tokens of the vocabulary that are in fp32 at a time


@dataclass(frozen=True)
class Neighbour:
    """A token of the vocabulary.

    Args:
        id: its number.
        text: what it reads; None without a tokenizer, and where it is a part of a character.
        similarity: the cosine between its embedding and the virtual token.
    """

    id: int
    text: str | None
    similarity: float

    def __str__(self) -> str:
        text = f"#{self.id}" if self.text is None else repr(self.text)
        return f"{text} {self.similarity:.2f}"


@dataclass(frozen=True)
class VirtualToken:
    """A virtual token, and what it is near to.

    Args:
        place: which one it is, of those in front of the same sequence.
        norm: of its row.
        nearest: the nearest tokens of the vocabulary, the nearest first.
        task: whose it is, of multitask prompt tuning.
        part: "encoder" or "decoder", of a model that has both.
    """

    place: int
    norm: float
    nearest: tuple[Neighbour, ...]
    task: int | None = None
    part: str = ""


class NearestTokens(list[VirtualToken]):
    """The virtual tokens of an adapter; printed, a table.

    ``vocabulary_norm`` is the median norm of the vocabulary's embeddings: virtual tokens whose own
    is many times that were trained at too high a rate.
    """

    vocabulary_norm: float

    def __str__(self) -> str:
        lines = [f"the median norm of the vocabulary is {self.vocabulary_norm:.3g}"]
        for one in self:
            front = [one.part, "" if one.task is None else f"task {one.task}", f"{one.place:>3}"]
            words = "  ".join(map(str, one.nearest))
            lines.append(f"{' '.join(filter(None, front))}  norm {one.norm:<7.3g} {words}")
        return "\n".join(lines)


@torch.no_grad()
def nearest_tokens(
    model: Any,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    k: int = 5,
    task_ids: Sequence[int] | None = None,
) -> NearestTokens:
    """The tokens of the vocabulary that are nearest to each virtual token of an adapter.

    Args:
        model: a ``PeftModel``.
        adapter_name: which adapter; the active prompt by default.
        tokenizer: the base model's, by which the tokens are shown; without one they are numbers.
        k: how many of them.
        task_ids: which tasks of multitask prompt tuning; all by default.

    Raises:
        StateError: the adapter holds no embeddings.
        ValueError: k or task_ids is out of range, or the model's input has no
            vocabulary.
    """
    name = chosen(model, adapter_name)
    switch = model.base_model.switch
    config, shared = switch.configs[name], switch.shared.get(name)
    need_embeddings(config, f"{name!r} is", model.peft_config)
    table = shared.table if isinstance(shared, Tokens) else None
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"the virtual tokens of {name!r} stand among patches or what else has no vocabulary, "
            "so no token is near to them"
        )
    device = table.weight.device
    embed = lambda ids: table(ids.to(device))  # noqa: E731
    size = table.num_embeddings
    return nearest_in(config, tensors_of(model, name), embed, size, tokenizer, k, task_ids)


def need_embeddings(config: Any, what: str, every: Mapping[str, Any] = {}) -> None:
    """Stop where an adapter holds no embeddings.

    Args:
        config: its config.
        what: the beginning of the message.
        every: the configs of its model's adapters.

    Raises:
        StateError: what it holds instead.
    """
    if isinstance(config, TokensConfig):
        return
    text = f"{what} a {config.method} adapter, which holds no embeddings of virtual tokens"
    if holds_layers(config):
        kind = "prompts" if config.is_adaption_prompt else "keys and values"
        raise StateError(
            f"{text} but {kind} of single attentions, to which no token is near; "
            "graftwork.prompt_norms shows their norms"
        )
    raise StateError(f"{text}; {prompts_of(every)}")


def nearest_in(
    config: Any,
    tensors: Mapping[str, Tensor],
    embed: Callable[[Tensor], Tensor],
    size: int,
    tokenizer: Any = None,
    k: int = 5,
    task_ids: Sequence[int] | None = None,
) -> NearestTokens:
    """What ``nearest_tokens`` gives, of tensors under PEFT's names.

    Args:
        config: the adapter's config.
        tensors: what its file holds.
        embed: the embeddings of tokens.
        size: how many tokens there are.
        tokenizer: as in ``nearest_tokens``, as the next two.
        k: how many.
        task_ids: which tasks.

    Raises:
        ValueError: a task is not there, or k is below 1.
        StateError: the vocabulary is of another width.
    """
    if k < 1:
        raise ValueError(f"k={k} is how many tokens are to be shown; give 1 or more")
    tasks, rows = _rows(config, tensors, task_ids)  # (tasks, total, width)
    n = config.n
    if config.num_transformer_submodules == 2:  # the first half stands in front of the encoder
        parts = {"encoder": rows[:, :n]}
        if isinstance(config, MultitaskPromptTuningConfig):  # nothing else reads the second
            parts["decoder"] = rows[:, n:]
    else:
        parts = {"": rows}
    out, which = NearestTokens(), []
    for part, of in parts.items():
        which += [(i, task, part) for task in tasks for i in range(of.shape[1])]
    every = torch.cat([of.flatten(0, 1) for of in parts.values()])
    alike, ids, out.vocabulary_norm = similar(every, embed, size, k)
    text = {i: text_of(tokenizer, i) for i in set(ids.flatten().tolist())} if tokenizer else {}
    for i, (place, task, part) in enumerate(which):
        near = zip(ids[i].tolist(), alike[i].tolist(), strict=True)
        nearest = tuple(Neighbour(token, text.get(token), value) for token, value in near)
        out.append(VirtualToken(place, every[i].norm().item(), nearest, task, part))
    return out


def similar(
    rows: Tensor, embed: Callable[[Tensor], Tensor], size: int, k: int
) -> tuple[Tensor, Tensor, float]:
    """The greatest cosines (rows, k) between rows (rows, width) and the embeddings of ``size``
    tokens, the tokens (rows, k), and the median norm of all embeddings.

    Raises:
        StateError: the embeddings are of another width.
    """
    unit = nn.functional.normalize(rows.float(), dim=1)
    cosines, norms = [], []
    for ids in torch.split(torch.arange(size), CHUNK):
        table = embed(ids).to(unit)  # (chunk, width)
        if table.shape[1] != unit.shape[1]:
            raise StateError(
                f"the virtual tokens have {unit.shape[1]} numbers, and the vocabulary's embeddings "
                f"{table.shape[1]}; is it this adapter's base model?"
            )
        norms.append(table.norm(dim=1))
        cosines.append(unit @ nn.functional.normalize(table, dim=1).T)
    best = torch.cat(cosines, dim=1).topk(min(k, size), dim=1)
    return best.values, best.indices, torch.cat(norms).median().item()


def text_of(tokenizer: Any, i: int) -> str | None:
    """A token as it stands in a text, the space in front of it included; None where it is none."""
    token = tokenizer.convert_ids_to_tokens(i)
    if token is None:  # rows that fill the table up
        return None
    if "▁" in token:
        return str(token.replace("▁", " "))
    text = str(tokenizer.convert_tokens_to_string([token]))
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return str(token) if token.isascii() else None
    return text


def _rows(
    config: Any, tensors: Mapping[str, Tensor], task_ids: Sequence[int] | None
) -> tuple[list[int | None], Tensor]:
    """The tasks, and the rows that stand in front of the tokens of each, (tasks, total, width)."""
    rows = tensors["prompt_embeddings"].float()
    if not isinstance(config, MultitaskPromptTuningConfig):
        if task_ids is not None:
            raise ValueError(f"task_ids is of multitask prompt tuning, not of {config.method}")
        return [None], rows[None]
    u, v = (tensors[name].float() for name in (Tasks.keys["u"], Tasks.keys["v"]))
    tasks = list(range(len(u)) if task_ids is None else task_ids)
    if odd := [task for task in tasks if not 0 <= task < len(u)]:
        raise ValueError(f"there is no task {odd[0]}; there are 0 to {len(u) - 1}")
    return [None] if len(u) == 1 else [*tasks], rows * (u[tasks] @ v[tasks])
