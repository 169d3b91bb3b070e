"""Loading an adapter into a ``PeftModel``: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import PeftConfig, TargetConfig
from ..engine.inject import switch_of
from ..engine.switch import Switch
from ..engine.tree import hosts
from ..errors import FileError, StateError, TargetError, did_you_mean, warn
from ..fast.pause import uncollected
from ..files import align, codec, identity, starts
from ..files.atomic import settled
from ..files.folder import Contents, config_of, read_beside
from ..files.guard import described
from ..files.hub import HUB_OPTIONS, Source
from ..files.intact import intact, undone
from ..updates.hotswap import refresh
from . import resuming
from .functional import user_model

if TYPE_CHECKING:
    from ..files.readings import Reading
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
        known = ("subfolder", *HUB_OPTIONS, "use_auth_token")
        self.source = Source(model_id, **{k: v for k, v in options.items() if k in known})
        self.key_mapping, self.allow_pickle = key_mapping, bool(options.get("allow_pickle"))
        self.reading: Reading | None = None  # another one than as it is
        self.reason = ""  # why there is none
        self.compared: Any = None  # how it fits the adapter that is filled, where that is known
        settled(self.source.at, partial(self._read, config, is_trainable))

    def _read(self, config: PeftConfig | None, is_trainable: bool) -> None:
        contents = Contents(self.source, self.allow_pickle)
        self.note, self.described = contents.note, config is None
        self.config = copy(config) if config is not None else config_of(self.source)
        elsewhere = self.config.found(self.source)
        self.config.inference_mode = not is_trainable
        self.training = read_beside(self.source, "training", self.note) if is_trainable else {}
        self.start = read_beside(self.source, "start", self.note)
        if self.training and hasattr(self.config, "rank_pattern"):
            self.file_config = copy(self.config)
            if self.config.has_schedule():
                self.config.rank_pattern = None  # its whole state follows
        else:
            self.file_config = self.config
        self.tensors = elsewhere | contents.tensors

    def one_more(self, model: PeftModel, name: str, autocast: bool) -> codec.LoadReport:
        """Load the adapter beside those of a model, or anew into one of that name."""

        def put() -> PeftModel:
            model.add_adapter(name, self.config, False, autocast, start=False)
            return model

        def drop(placed: PeftModel) -> None:
            model.base_model.delete_adapter(name)

        with model.base_model.switch.change(name):
            if name in model.peft_config:
                return self.load_into(model, name, new=False)
            report: codec.LoadReport = self.bring(model, name, put, drop)[1]
            return report

    def bring(self, model: nn.Module, name: str, put: Any, drop: Any) -> Any:
        """Put the adapter in place and fill it; where it does not fit as it is, and just one other
        reading of the file does, by that one.

        Args:
            model: the model, with or without other adapters.
            name: the adapter's name.
            put: puts an adapter of ``self.config`` in place, and gives the ``PeftModel``.
            drop: takes it away again.

        Returns:
            The ``PeftModel`` and the report.

        Raises:
            FileError: nothing fits, or several readings do.
            TargetError: what the config names is not in the model.
        """
        base = user_model(model)

        def built() -> Any:
            if not self.described:
                return put()
            with described(self.config, base, self.tensors, self.source):
                return put()

        open_ = isinstance(self.config, TargetConfig) and not self.training
        try:
            placed = built()
        except TargetError as error:
            if not open_ or not self._read_otherwise(base, error):
                raise
            open_, placed = False, built()
        try:
            parts = codec.owned(base, name, self.file_config)
            if open_ and not self._fits(base, parts) and self._read_otherwise(base):
                drop(placed)
                placed = built()
                parts = codec.owned(base, name, self.file_config)
            return placed, self.load_into(placed, name, new=True, parts=parts)
        except BaseException:
            drop(placed)
            raise

    def _fits(self, base: nn.Module, parts: list[codec.Owned]) -> bool:
        report, found = codec.compare(base, parts, self.tensors, self.key_mapping)
        if report.ok or self.key_mapping:
            self.compared = (report, found) if report.ok else None
            return report.ok
        return self._aligned(base, parts, quiet=True) is not None

    def _read_otherwise(self, base: nn.Module, error: TargetError | None = None) -> bool:
        """Whether there is just one other reading of the file; it is taken."""
        from ..files.readings import Reader, fitting

        switch = switch_of(base) or Switch()
        assert isinstance(self.config, TargetConfig)
        reader = Reader(base, switch, self.config, self.tensors, self.key_mapping)
        found = fitting(reader.readings(), str(self.source))
        if found is None:
            if error is not None:
                raise TargetError(f"{error}\n{reader.why(self.source)}") from error
            self.reason = reader.reason
            return False
        self.config = self.file_config = found.config
        self.tensors, self.start = found.tensors, found.beside(self.start)
        self.reading, self.key_mapping = found, None
        warn(found.told(str(self.source)))
        return True

    @uncollected()
    def load_into(
        self, model: PeftModel, name: str, new: bool, parts: list[codec.Owned] | None = None
    ) -> codec.LoadReport:
        """Fill an adapter that is in place; where that fails, nothing is changed. ``parts``: its
        own, where they are known.
        """
        base = model.get_base_model()
        if not new:
            if name in model.base_model.merged():
                raise StateError(f"{name!r} is merged: unmerge_adapter() before it is loaded anew")
            self._check_same(model.peft_config[name])
        parts = codec.owned(base, name, self.file_config) if parts is None else parts
        with codec.whole(base, parts, write=True):
            compared, self.compared = self.compared, None
            report, found = compared or codec.compare(base, parts, self.tensors, self.key_mapping)
            if not report.ok and not (self.key_mapping or self.training or self.reading):
                report, found = self._aligned(base, parts) or (report, found)
            if self.reading is not None:
                report.renamed |= self.reading.renamed
            codec.judge(report, str(self.source), self.strict, partial(self._hint, base))
            changed = codec.carried(base, parts, self.tensors, found).values()
            with undone((), changed) if new else intact(base, name, changed):
                self._fill(model, name, new, parts, report, found)
                self._check_base(base)
            return report

    def _fill(
        self,
        model: PeftModel,
        name: str,
        new: bool,
        parts: list[codec.Owned],
        report: codec.LoadReport,
        found: dict[str, str],
    ) -> None:
        base = model.get_base_model()
        starts.fill(parts, self.start, self.key_mapping, f"the start in {self.source}", self.strict)
        resuming.check(model, name, self.training, str(self.source))
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
        resuming.load_training_state(model, name, self.training)
        if self.training and ranked:
            model.peft_config[name].rank_pattern = self.file_config.rank_pattern  # type: ignore[attr-defined]

    def _aligned(
        self, base: nn.Module, parts: list[codec.Owned], quiet: bool = False
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
        if quiet:
            return report, found
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
        if state := resuming.of_part(codec.MARK, self.training):
            resuming.need_alike(state, shared.training_state(), str(self.source))
        return shared if state else None

    def _hint(self, base: nn.Module) -> str:
        saved = self.note.get("identity")
        found = identity.differences(base, saved) if saved else []
        differs = [f"the base model differs in {'; '.join(found)}"] if found else []
        other = [f"under other names too, {self.reason}"] if self.reason else []
        return f" ({'. '.join(differs + other)})" if differs or other else ""

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
