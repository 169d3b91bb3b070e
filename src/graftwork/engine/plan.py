"""The plan of an adapter: which part goes where, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ..config import TargetConfig
from ..errors import StateError, warn
from . import match
from .adapter import Adapter
from .host import Host
from .module import part_key
from .offer import Offer, Target
from .parts import Bias, Copy, Whole
from .site import Conv1D, Embedding, ParameterSite, Site, kind_of
from .tree import tied_ends

Key = tuple[str, str]  # path, key of the part there


@dataclass
class Slot:
    """One part to build: where, under which key, how, and the front of its names in a file."""

    path: str
    key: str
    build: Callable[[Host], Adapter] | None
    prefix: str = ""
    source: Key | None = None  # the part at the other end of a tied weight, instead of ``build``
    transposed: bool = False  # whether the two ends see the weight transposed
    saved: bool = True  # whether PEFT's file repeats the tensors at that end
    times: float = 1.0  # how many times PEFT applies the update


def plan(offer: Offer, config: TargetConfig) -> list[Slot]:
    """All parts of an adapter; what the config leaves open is filled in."""
    config.prepare(offer)
    _add_heads(config, offer)
    config.target_modules = match.resolved(offer, config)
    _share(offer, config)
    targets = match.find(offer, config)
    slots = [
        *_biases(config, offer, targets),
        *_main(config, targets),
        *_saved(config, offer),
        *_tokens(config, offer),  # last: trained rows replace whatever is beneath
    ]
    return slots + _ties(offer, config, slots)


def _add_heads(config: TargetConfig, offer: Offer) -> None:
    """The task classes save the head that was newly made for the task."""
    heads = {
        "SEQ_CLS": ("classifier", "score"),
        "TOKEN_CLS": ("classifier", "score"),
        "QUESTION_ANS": ("qa_outputs",),
    }
    wanted = heads.get(getattr(config.task_type, "value", ""), ())
    saved = list(config.modules_to_save or ())
    if missing := [n for n in wanted if n not in saved and offer.ending_with(n)]:
        config.modules_to_save = saved + missing


def _share(offer: Offer, config: TargetConfig) -> None:
    """With ``ensure_weight_tying``, a name of an embedding's other end means the embedding."""
    if not getattr(config, "ensure_weight_tying", False) or not isinstance(
        config.target_modules, set
    ):
        return
    for first in [p for p, m in offer.modules.items() if isinstance(m, nn.Embedding)]:
        ends = {path for path, end in tied_ends(offer.model, first) if kind_of(end)}
        far = {e for e in config.target_modules if ends.intersection(offer.ending_with(e))}
        if far:
            config.target_modules = (config.target_modules - far) | {first}


def _main(config: TargetConfig, targets: list[Target]) -> Iterator[Slot]:
    for t in targets:
        key = part_key(t.parameter) if t.parameter else config.method.value.lower()
        slot = Slot(t.path, key, _at(config, key), _prefix(t, targets) if t.parameter else "")
        # PEFT 0.21 merges the output projection of an adapted attention twice, before each call
        slot.times = 2.0 if slot.prefix == "base_layer.out_proj." else 1.0
        yield slot


def _at(config: TargetConfig, key: str) -> Callable[[Host], Adapter]:
    return lambda host: config.build(host.need_site(key))


def _prefix(target: Target, targets: list[Target]) -> str:
    """PEFT nests a wrapper per parameter, the first innermost; attention's output is a child."""
    mine = [t.parameter for t in targets if t.path == target.path and t.parameter]
    if isinstance(target.module, nn.MultiheadAttention):
        if target.parameter == "out_proj.weight":
            return "base_layer.out_proj." if len(mine) > 1 else "out_proj."
        return "" if target.parameter == "in_proj_weight" else f"{target.parameter}."
    own = [n for n in target.module._parameters if n in mine]
    return "base_layer." * (len(own) - 1 - own.index(target.parameter or ""))


def _saved(config: TargetConfig, offer: Offer) -> Iterator[Slot]:
    for path in match.saved_modules(offer, config):
        module = offer.modules[path]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise TypeError(
                f"modules_to_save cannot copy {path}, a {type(module).__name__}, which is never "
                "called; "
                "name the modules in it"
            )
        if any(isinstance(m, Host) for m in module.modules()):
            raise StateError(
                f"modules_to_save names {path}, in which another adapter already sits; name a "
                "module "
                "beside it, or delete that adapter first"
            )
        yield Slot(path, "copy", lambda host: Copy(host.base_layer, host.path))


def _tokens(config: TargetConfig, offer: Offer) -> Iterator[Slot]:
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return
    from ..methods.tokens import TrainableTokensConfig

    if not isinstance(wanted, dict):
        wanted = {offer.input_embedding(): wanted}
    for entry, indices in wanted.items():
        for path in match.named(offer, config, "trainable_token_indices", [entry]):
            tokens = TrainableTokensConfig(token_indices=list(indices))
            yield Slot(path, "trainable_tokens", _at(tokens, "trainable_tokens"), "token_adapter.")


def _biases(config: TargetConfig, offer: Offer, targets: list[Target]) -> Iterator[Slot]:
    wanted, chosen = getattr(config, "bias", "none"), {t.path for t in targets}
    saved = match.saved_modules(offer, config)
    for path, layer in offer.modules.items() if wanted != "none" else ():
        if layer._parameters.get("bias") is None or match.within(path, saved):
            continue
        if wanted == "lora_only" and path not in chosen:
            continue
        parent, _, name = path.rpartition(".")
        if isinstance(offer.modules.get(parent), nn.MultiheadAttention):
            prefix = f"base_layer.{name}.base_layer." if parent in chosen else f"{name}."
            yield Slot(parent, part_key(f"{name}.bias"), _whole(f"{name}.bias"), prefix)
        elif kind_of(layer):
            yield Slot(
                path,
                "bias",
                lambda host: Bias(host.need_site("bias")),
                "base_layer." * (path in chosen),
            )
        else:
            yield Slot(path, part_key("bias"), _whole("bias"))


def _whole(parameter: str) -> Callable[[Host], Adapter]:
    return lambda host: Whole(ParameterSite(host, parameter))


def _ties(offer: Offer, config: TargetConfig, slots: list[Slot]) -> list[Slot]:
    """Where an adapter acts at both ends of a tied weight, a part that refers to the first end.

    Trained tokens always do. What sits at the input embedding also acts at the embeddings that are
    tied to it, since models such as T5 call only those.
    """
    wished = bool(getattr(config, "ensure_weight_tying", False))
    first = offer.first_embedding()
    taken = {slot.path for slot in slots if slot.key != "bias"}
    extra = []
    for slot in slots:
        here = offer.modules[slot.path]
        if slot.key == "bias" or not kind_of(here):
            continue
        everywhere = wished or slot.key == "trainable_tokens"
        for path, end in tied_ends(offer.model, slot.path):
            called = slot.path == first and isinstance(end, nn.Embedding)
            if path not in taken and kind_of(end) and (everywhere or called):
                taken.add(path)
                turned = _turned(here) != _turned(end)
                saved = everywhere and not slot.prefix  # rows beside a LoRA are saved once
                source = (slot.path, slot.key)
                extra.append(Slot(path, "tied", None, "", source, turned, saved))
    if wished and not extra:
        warn("ensure_weight_tying has no effect: no adapter sits at a tied weight")
    return extra


def _turned(layer: nn.Module) -> bool:
    return issubclass(kind_of(layer) or Site, (Embedding, Conv1D))
