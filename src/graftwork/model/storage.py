"""Saving and loading the adapters of a ``PeftModel``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..engine.tree import hosts
from ..errors import FileError, StateError, did_you_mean, warn
from ..fast.pause import uncollected
from ..files import align, codec, identity, starts
from ..files.bounded import plain_name, shown
from ..files.folder import Contents, config_of, read_beside, write
from ..files.guard import described
from ..files.hub import HUB_OPTIONS, Source
from ..updates.hotswap import refresh
from .card import model_card
from .functional import get_peft_model_state_dict

if TYPE_CHECKING:
    from .peft_model import PeftModel

# what may differ between a file and the adapter that takes its values
FLEETING = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "allow_unmatched",
    "runtime_config",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
}
LOADER_OPTIONS = (
    "subfolder",
    "strict",
    "allow_pickle",
    "use_auth_token",
    "ignore_mismatched_sizes",
    *HUB_OPTIONS,
)


def save(
    model: PeftModel,
    directory: str | os.PathLike[str],
    selected: list[str] | None,
    embeddings: str | bool,
    plain: bool,
    state_dict: Mapping[str, Tensor] | None,
    compat: str | None = None,
) -> None:
    """Write adapters into a folder; see ``PeftModel.save_pretrained``."""
    folder = Path(directory)
    if folder.is_file():
        raise FileError(f"{folder} is a file; give a folder to save_pretrained")
    names = list(model.peft_config) if selected is None else list(selected)
    if unknown := [n for n in names if n not in model.peft_config]:
        raise StateError(
            f"selected_adapters names {unknown}; this model has {sorted(model.peft_config)}"
            + did_you_mean(unknown[0], model.peft_config)
        )
    _check_names(names)
    if compat == "peft":  # before anything is written
        for name in names:
            model.peft_config[name].for_peft(model.get_base_model(), {})
    note = {"identity": identity.identity(model.get_base_model())}
    for name in names:
        config = model.peft_config[name]
        tensors = get_peft_model_state_dict(
            model, state_dict, name, save_embedding_layers=embeddings
        )
        if plain:
            config, tensors = as_plain_lora(model.get_base_model(), config, name, tensors)
        if compat == "peft":
            config, tensors = config.for_peft(model.get_base_model(), tensors)
        config = copy(config)
        config.inference_mode = True
        config.base_model_name_or_path = (
            config.base_model_name_or_path or model.get_base_model().__dict__.get("name_or_path")
        )
        target = folder if name == "default" else folder / name
        start = {} if plain else starts.state(model.get_base_model(), name)
        beside = {"training": training_state(model, name), "start": start}
        write(target, config, tensors, note, beside)
        for inner, (own, values) in config.folders(model.get_base_model(), name).items():
            if name == "default" and inner in names:
                raise StateError(
                    f"the folder {inner!r} would hold both the adapter of that name and a part of "
                    "'default'; rename_adapter() the former, or save them apart"
                )
            write(target / inner, own, values, note, {})
    model_card(folder, model.active_peft_config)


def _check_names(names: list[str]) -> None:
    if odd := [n for n in names if not plain_name(n)]:
        raise StateError(
            f"{shown(odd[0])} cannot be the name of a folder on every system, so the adapter is "
            "not saved; rename_adapter() it first"
        )


def training_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What a resumed training needs beyond the adapter's own file: what its parts share that is not
    there, and the state of its schedule.
    """
    switch = model.base_model.switch
    schedule, shared = switch.schedules.get(name), switch.shared.get(name)
    state = {} if shared is None else shared.training_state()
    out = {f"{codec.MARK}:{key}": tensor.detach() for key, tensor in state.items()}
    if schedule is None or schedule.first() is None:
        return out
    out["step"] = torch.tensor(schedule.step)
    for path, adapter in schedule.adapters.items():
        out.update(
            {f"{path}:{key}": tensor.detach() for key, tensor in adapter.training_state().items()}
        )
    return out


def load_training_state(model: PeftModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Take back what ``training_state`` gave."""
    switch = model.base_model.switch
    schedule = switch.schedules.get(name)
    with torch.no_grad():
        if state := _at(codec.MARK, tensors):
            switch.shared[name].load_training_state(state)
        if schedule is not None and "step" in tensors:
            schedule.step, schedule.version = int(tensors["step"]), None
            for path, adapter in schedule.adapters.items():
                adapter.load_training_state(_at(path, tensors))


def _at(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a training state holds of one part."""
    return {k.partition(":")[2]: v for k, v in tensors.items() if k.partition(":")[0] == path}


class Loader:
    """One adapter that is being loaded.

    Args:
        model_id: its folder or hub id.
        config: used instead of the folder's.
        is_trainable: whether it will be trained on.
        key_mapping: regex -> replacement for names.
        options: ``strict``, ``allow_pickle``, ``subfolder`` and the hub's options.

    Raises:
        FileError: there is no such adapter.
        TypeError: an option is unknown.
    """

    def __init__(
        self,
        model_id: str | os.PathLike[str],
        config: PeftConfig | None,
        is_trainable: bool,
        key_mapping: dict[str, str] | None,
        options: dict[str, Any],
    ) -> None:
        for name in options:
            if name not in LOADER_OPTIONS and name not in (
                "torch_dtype",
                "dtype",
                "device_map",
                "max_memory",
                "offload_dir",
            ):
                raise TypeError(
                    f"{name} is no option of loading an adapter{did_you_mean(name, LOADER_OPTIONS)}"
                )
        self.strict = options.get("strict", "error") in ("error", True)
        self.source = Source(
            model_id,
            **{
                k: v
                for k, v in options.items()
                if k in ("subfolder", *HUB_OPTIONS, "use_auth_token")
            },
        )
        contents = Contents(self.source, allow_pickle=bool(options.get("allow_pickle")))
        self.config = copy(config) if config is not None else config_of(self.source, contents.note)
        where = partial(described, self.config, where=self.source)
        self.building: Any = where if config is None else lambda *_: nullcontext()
        elsewhere = self.config.found(self.source)
        self.config.inference_mode = not is_trainable
        self.key_mapping = key_mapping
        self.note = contents.note
        self.training = read_beside(self.source, "training", self.note) if is_trainable else {}
        self.start = read_beside(self.source, "start", self.note)
        if self.training and hasattr(self.config, "rank_pattern"):
            self.file_config = copy(self.config)
            if self.config.has_schedule():
                self.config.rank_pattern = None  # its whole state follows
        else:
            self.file_config = self.config
        self.tensors = elsewhere | contents.tensors

    @uncollected()
    def load_into(self, model: PeftModel, name: str, new: bool) -> codec.LoadReport:
        """Fill an adapter that is in place; nothing is changed where the file does not fit."""
        base = model.get_base_model()
        if not new:
            self._check_same(model.peft_config[name])
        parts = codec.owned(base, name, self.file_config)
        report, found = codec.compare(base, parts, self.tensors, self.key_mapping)
        if not report.ok and not (self.key_mapping or self.training):
            report, found = self._aligned(base, parts) or (report, found)
        codec.judge(report, str(self.source), self.strict, partial(self._hint, base))
        starts.fill(parts, self.start, self.key_mapping, f"the start in {self.source}", self.strict)
        resumed = self._resumed(model.base_model.switch.shared.get(name), new)
        if report.missing and new:
            _start_missing(base, name, parts, found)
        codec.fill(base, parts, self.tensors, found, resumed)
        if not new:
            self.file_config.fill(base, name)
            refresh(base, name)
        ranked = hasattr(self.file_config, "rank_pattern")
        if not new and ranked and self.config.has_schedule():
            model.peft_config[name].rank_pattern = self.file_config.rank_pattern  # type: ignore[attr-defined]
        load_training_state(model, name, self.training)
        if self.training and ranked:
            model.peft_config[name].rank_pattern = self.file_config.rank_pattern  # type: ignore[attr-defined]
        self._check_base(base)
        return report

    def _aligned(
        self, base: nn.Module, parts: list[codec.Owned]
    ) -> tuple[codec.LoadReport, dict[str, str]] | None:
        """The comparison by names whose front is another one here, where there is just one such."""
        every = codec.expected(parts)
        want = {name: shape for name, (_, _, shape) in every.items()}
        shapes = {codec.renamed(k, None, want): tuple(t.shape) for k, t in self.tensors.items()}
        here = {name: shape for name, shape in want.items() if name not in shapes}
        there = {name: shape for name, shape in shapes.items() if name not in want}
        if (pair := align.moved(there, here, {n: every[n][1] for n in here})) is None:
            return None
        mapping = align.mapping(*pair)
        report, found = codec.compare(base, parts, self.tensors, mapping)
        if not report.ok:
            return None
        self.key_mapping = mapping
        old, new = (repr(front or "no front") for front in pair)
        warn(
            f"{self.source} was saved from a model whose layers have other names: {old} there is "
            f"{new} here. All {len(report.matched)} tensors fit and are loaded; give "
            f"key_mapping={mapping} to say so yourself"
        )
        return report, found

    def _resumed(self, shared: Any, new: bool) -> Any:
        """What is filled from the training state instead of from the file."""
        if shared is None or not shared.resumes:
            mine = f"{codec.MARK}:"
            self.training = {k: t for k, t in self.training.items() if not k.startswith(mine)}
            return None
        if not new and not self.training:  # the adapter in place trains, so it needs what it lacks
            self.training = read_beside(self.source, "training", self.note)
        state, own = _at(codec.MARK, self.training), shared.training_state()
        if state and {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in own.items()}:
            raise FileError(
                f"the training state in {self.source} is that of another config than this adapter "
                f"has: {sorted(state)} there, {sorted(own)} here, or of other shapes; load it with "
                "the config that it was saved with"
            )
        return shared if state else None

    def _hint(self, base: nn.Module) -> str:
        saved = self.note.get("identity")
        found = identity.differences(base, saved) if saved else []
        return f" (the base model differs in {'; '.join(found)})" if found else ""

    def _check_base(self, base: nn.Module) -> None:
        saved = self.note.get("identity")
        if saved and (found := identity.differences(base, saved)):
            warn(
                f"{self.source} was trained on another base model than this one, which differs in "
                f"{'; '.join(found)}"
            )

    def _check_same(self, own: PeftConfig) -> None:
        mine, theirs = own.to_dict(), self.file_config.to_dict()
        free = FLEETING | ({"rank_pattern"} if own.has_schedule() else set())
        if any(_subtracts(config.get("init_lora_weights")) for config in (mine, theirs)):
            free = free - {"init_lora_weights"}  # the file's B A is beside what was taken away
        every = [k for k in mine if k not in free]
        other = [k for k in every if _plain(mine[k]) != _plain(theirs.get(k, mine[k]))]
        if own.method != self.file_config.method or other:
            what = (
                ", ".join(f"{k}: {theirs.get(k)!r} there, {mine[k]!r} here" for k in other)
                or "its method"
            )
            raise FileError(
                f"{self.source} was saved with another config than this adapter has ({what}); load "
                "it under a name of its own"
            )


def _subtracts(how: Any) -> bool:
    """Whether a start of this name is taken away again."""
    from ..inits import STARTS

    start = STARTS.get(str(how).lower().partition("_niter")[0])
    return start is not None and start.subtract


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, list, tuple)) else value or None


def _start_missing(
    base: nn.Module, name: str, parts: list[codec.Owned], found: Mapping[str, str]
) -> None:
    """Where a file is loaded in part, what it lacks begins as a new adapter does."""
    lacking = {
        id(o.part) for plain, (o, _, _) in codec.expected(parts).items() if plain not in found
    }
    for host in hosts(base).values():
        for key, part in host.parts_of(name):
            site = host.site_of(key)
            if id(part) in lacking and site is not None:
                with torch.no_grad():
                    part.start(site)


def as_plain_lora(
    base: nn.Module, config: PeftConfig, name: str, tensors: dict[str, Tensor]
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """A LoRA minus its start, as a plain one: B A - B0 A0 = [B, -B0] [A; A0]."""
    if config.method != "LORA" or getattr(config, "variant", None):
        raise ValueError(
            "only a LoRA can be written as a plain LoRA; leave "
            "path_initial_model_for_weight_conversion out"
        )
    double, out = copy(config), dict(tensors)
    for o in codec.owned(base, name):
        a0, b0 = getattr(o.part, "A0", None), getattr(o.part, "B0", None)
        if a0 is None or b0 is None:
            continue
        keys = [codec.PREFIX + o.front + o.part.keys[k] for k in ("A", "B")]
        if len(a0) != len(tensors[keys[0]]):
            raise ValueError(
                f"{name!r} takes away a start of full rank (LoftQ), so it is no plain LoRA of "
                "twice the rank; use save_as_lora, or merge it"
            )
        out[keys[0]] = torch.cat([tensors[keys[0]], a0], dim=0)
        out[keys[1]] = torch.cat([tensors[keys[1]], -b0], dim=1)
    factor = 2**0.5 if double.use_rslora else 2  # type: ignore[attr-defined]
    double.r, double.lora_alpha = double.r * 2, double.lora_alpha * factor  # type: ignore[attr-defined]
    double.rank_pattern = {k: v * 2 for k, v in (double.rank_pattern or {}).items()}  # type: ignore[attr-defined]
    double.alpha_pattern = {k: v * factor for k, v in (double.alpha_pattern or {}).items()}  # type: ignore[attr-defined]
    double.init_lora_weights = True  # type: ignore[attr-defined]
    return double, out
