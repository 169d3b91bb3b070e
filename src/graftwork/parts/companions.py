"""What a config brings along beside its own method: saved modules, trained biases and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from ..engine.adapter import Adapter
from ..engine.host import Host
from ..engine.module import part_key
from ..engine.site import ParameterSite, kind_of
from ..engine.tree import hosts
from ..errors import StateError, TargetError
from ..targets.experts import spell_out
from ..targets.match import Match, within
from ..targets.plan import ABOVE, BENEATH, Slot, at
from .whole import Bias, Copy, Whole

if TYPE_CHECKING:
    from ..config import TargetConfig
    from ..targets.offer import Offer, Target

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def prepare(config: TargetConfig, offer: Offer) -> None:
    """Spell out what a config means in a model: the heads of its task, and stacked experts."""
    if hasattr(config, "rank_pattern"):
        spell_out(config, offer)
    wanted = HEADS.get(getattr(config.task_type, "value", ""), ())
    saved = list(config.modules_to_save or ())
    if missing := [n for n in wanted if n not in saved and offer.ending_with(n)]:
        config.modules_to_save = saved + missing


def companions(match: Match, targets: list[Target]) -> Iterator[Slot]:
    """The slots that a config asks for beside those of its method."""
    yield from _biases(match, targets)
    yield from _saved(match)
    yield from _tokens(match)  # last: trained rows replace whatever is beneath


def _saved(match: Match) -> Iterator[Slot]:
    for path in match.saved():
        module = match.offer.modules[path]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise TypeError(
                f"modules_to_save cannot copy {path}, a {type(module).__name__}, which is never "
                "called; name the modules in it"
            )
        if hosts(module):
            raise StateError(
                f"modules_to_save names {path}, in which another adapter already sits; name a "
                "module beside it, or delete that adapter first"
            )
        yield Slot(path, "copy", lambda host, _: Copy(host.base_layer, host.path), level=ABOVE)


def _tokens(match: Match) -> Iterator[Slot]:
    from ..methods.tokens import TrainableTokensConfig

    field = "trainable_token_indices"
    wanted = match.config.trainable_token_indices
    if wanted and not isinstance(wanted, dict):
        wanted = {match.offer.input_embedding(): wanted}
    for entry, indices in (wanted or {}).items():
        for path in _tables(match, field, entry):
            build = at(TrainableTokensConfig(token_indices=list(indices)), "trainable_tokens")
            yield Slot(path, "trainable_tokens", build, "token_adapter.", ABOVE)


def _tables(match: Match, field: str, entry: str) -> list[str]:
    """The layers that an entry means; other modules may have a name that ends so."""
    paths = match.named(field, [entry])
    found = [path for path in paths if kind_of(match.offer.modules[path])]
    if paths and not found:
        kind = type(match.offer.modules[paths[0]]).__name__
        raise TargetError(
            f"{field} names {paths[0]}, a {kind}, which has no rows of tokens; name the embedding"
        )
    return found


def _biases(match: Match, targets: list[Target]) -> Iterator[Slot]:
    wanted, chosen = match.config.bias, {t.path for t in targets}
    saved = match.saved()
    for path, layer in match.offer.modules.items() if wanted != "none" else ():
        if layer._parameters.get("bias") is None or within(path, saved):
            continue
        if wanted.endswith("_only") and path not in chosen:
            continue
        parent, _, name = path.rpartition(".")
        if isinstance(match.offer.modules.get(parent), nn.MultiheadAttention):
            prefix = f"base_layer.{name}.base_layer." if parent in chosen else f"{name}."
            yield _parameter(parent, f"{name}.bias", prefix)
        elif kind_of(layer):
            prefix = "base_layer." * (path in chosen)
            yield Slot(path, "bias", lambda host, _: Bias(host.need_site("bias")), prefix, BENEATH)
        else:
            yield _parameter(path, "bias")


def _parameter(path: str, name: str, prefix: str = "") -> Slot:
    def build(host: Host, _: object) -> Adapter:
        return Whole(ParameterSite(host, name))

    return Slot(path, part_key(name), build, prefix, BENEATH)
