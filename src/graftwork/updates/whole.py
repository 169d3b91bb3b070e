"""What adapters train as a whole beside their matrices: copies, biases, rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.adapter import Adapter
from ..engine.host import Host
from ..engine.site import Embedding
from ..engine.ties import Tied
from ..engine.tree import hosts
from ..parts.tokens import Tokens
from ..parts.whole import Bias, Whole

COPY, TOKENS = "copy", "trainable_tokens"  # keys of parts
Wholes = dict[tuple[str, str], "Trained"]  # by path and key


@dataclass(frozen=True)
class Trained:
    """Tensors that are trained as a whole, and what they were."""

    tensors: dict[str, Tensor]
    base: dict[str, Tensor]


NOTHING = Trained({}, {})


def trained_of(host: Host, key: str, part: Adapter) -> Trained | None:
    """What a part trains as a whole; None: it is an update."""
    if (module := part.instead()) is not None:
        own = {n: t.detach() for n, t in module.state_dict().items()}
        return Trained(own, {n: host.pristine(n).detach() for n in own})
    if isinstance(part, Bias):
        return Trained({"bias": part.bias.detach()}, {"bias": part.origin})
    if isinstance(part, Whole):
        name = host.need_site(key).parameter
        return Trained({name: part.value.detach()}, {name: part.site.raw.detach()})
    if isinstance(part, Tokens):
        site = host.need_site(TOKENS)
        table = site.weight.mT if part.columns else site.weight
        ids = [str(i) for i in part.indices.tolist()]
        rows = dict(zip(ids, part.rows.detach(), strict=True))
        return Trained(rows, {i: table[int(i)].to(part.dtype) for i in ids})
    return None


@torch.no_grad()
def gathered(model: nn.Module, every: Sequence[Wholes]) -> list[Wholes]:
    """The same, where what one adapter copies is a copy in all of them: in one adapter made of
    them, the copy would hide what another trains there, its bias or its rows of tokens.

    Args:
        model: the model that has the adapters.
        every: what each adapter trains as a whole.
    """
    bases = {path: t.base for one in every for (path, key), t in one.items() if key == COPY}
    return [_gathered(hosts(model), one, bases) for one in every]


def _gathered(
    found: Mapping[str, Host], one: Wholes, bases: Mapping[str, dict[str, Tensor]]
) -> Wholes:
    made: Wholes = {place: t for place, t in one.items() if place[0] not in bases}
    made |= {place: t for place, t in one.items() if place[1] == COPY}
    for (path, key), mine in one.items():
        if (path, key) in made:
            continue
        copied = made.get((path, COPY), Trained(bases[path], bases[path]))
        tensors = dict(copied.tensors)
        if key == TOKENS:
            site = found[path].need_site(key)
            matrix = site.to_matrix(tensors[site.parameter].clone())
            for token, row in mine.tensors.items():
                at = (..., int(token)) if isinstance(site, Embedding) else int(token)
                matrix[at] = row.to(matrix)
            tensors[site.parameter] = site.from_matrix(matrix)
        else:
            for name, value in mine.tensors.items():
                tensors[name] = tensors[name] + (value - mine.base[name]).to(tensors[name])
        made[path, COPY] = Trained(tensors, copied.base)
    return made


def asked(saved: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a config that ask for what is trained as a whole."""
    tokens = {path: sorted(map(int, saved[path, key])) for path, key in saved if key == TOKENS}
    return {
        "modules_to_save": [path for path, key in saved if key == COPY] or None,
        "trainable_token_indices": tokens or None,
    }


@torch.no_grad()
def give(
    model: nn.Module, name: str, values: Mapping[tuple[str, str], Mapping[str, Tensor]]
) -> None:
    """Let an adapter take what is trained as a whole."""
    for path, host in hosts(model).items():
        for key, part in host.parts_of(name):
            if (path, key) in values and not isinstance(part, Tied):
                _give(part, values[path, key])


def _give(part: Adapter, values: Mapping[str, Tensor]) -> None:
    if (module := part.instead()) is not None:
        module.load_state_dict(dict(values))
    elif isinstance(part, Tokens):
        part.rows.copy_(torch.stack([values[str(i)] for i in part.indices.tolist()]))
    else:
        (value,) = values.values()
        next(part.parameters()).copy_(value)
