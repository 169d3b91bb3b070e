"""An adapter merged into a model's files, one after another.

The model is built around views of its files, so that every method, tie and head is treated as in a
model in memory; a layer's weights are read, folded in fp32, rounded once and written, and their
memory is given back. What is not adapted is copied byte by byte. All is put together in
``OUTPUT.partial``, where a run that was interrupted goes on, and renamed at the end.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import FileError, MergeError
from ..files.atomic import exchange, locked, replacing
from ..files.codec import PREFIX
from ..files.folder import read_tensors
from ..files.hub import Source
from ..model.probe import MergeReport, reporting
from .plan import Plan
from .readback import read_back, sampled
from .shards import INDEX, KINDS, SINGLE, Piece, Shard, shards_of, write

NOTE = "merge.json"  # in the working folder: what it is of, and what is done
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".index.json",
)
TOKENS = ("token", "vocab", "merges", "special", "added_tokens", "chat_template", "spiece")


@dataclass
class Merged:
    """What was done.

    Args:
        output: the folder.
        changed: the names of the tensors that the adapter has changed.
        copied: how many tensors are as they were.
        added: names of tensors that the base's files did not have.
        resumed: how many files an earlier run had written.
        report: the layers into which it was merged, and how far their outputs are from before.
    """

    output: Path
    changed: list[str] = field(default_factory=list)
    copied: int = 0
    added: list[str] = field(default_factory=list)
    resumed: int = 0
    report: MergeReport = field(default_factory=MergeReport)


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    kind: Any,
    config: Any,
    *,
    overwrite: bool = False,
    on_file: Callable[[int, int], None] | None = None,
    **loading: Any,
) -> Merged:
    """Write a base model's folder with an adapter merged into its weights.

    Args:
        base: the folder of the base model, with safetensors files.
        adapter: the adapter's folder or hub id.
        output: the folder to write, which plain transformers loads.
        kind: the class of transformers that builds the model from a config.
        config: the base model's config.
        overwrite: replace what is at ``output``.
        on_file: called with how many files are written, and how many there are.
        **loading: options of ``PeftModel.from_pretrained``.

    Raises:
        FileError: files are missing or damaged, or do not fit.
        MergeError: an update is not finite, or a layer has no place for it; nothing is left behind.
    """
    from ..model.peft_model import PeftModel

    source, target = Path(base), Path(output).expanduser().resolve()
    _need_plain(source, config)
    shards = shards_of(source)
    working = Working(target, _digest(shards, adapter), overwrite, (base, adapter))
    with working as work, reporting() as report:
        report.ratios.update(work.probed)
        plan = Plan(_built(kind, config, adapter, loading), shards)
        adapted = PeftModel.from_pretrained(plan.model, adapter, **loading)
        plan.adapt(tuple(adapted.active_adapters))
        found = Merged(target, report=report)
        report.adapters = list(adapted.active_adapters)
        extra: dict[str, Tensor] = {}
        for i, shard in enumerate(shards):
            _merge(plan, shard, work, found, extra)
            if on_file is not None:
                on_file(i + 1, len(shards))
        _add(plan, work, found, extra)
        plan.need_all(report.ratios)
        _write_rest(source, adapter, plan.model, extra, work.folder)
    return found


def _need_plain(source: Path, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(
            f"the model in {source} is quantised, and a merged weight would be rounded to that "
            "again; take the model before it was quantised"
        )


class Working:
    """The folder in which a merged model is put together: that of an earlier run of the same, or a
    new one. It becomes the output where all goes well; where a merge is refused, it is removed.

    Args:
        target: the output.
        digest: what it is of.
        overwrite: whether the output may be there.
        inputs: what is read, which is never overwritten.
    """

    def __init__(self, target: Path, digest: str, overwrite: bool, inputs: Sequence[Any]) -> None:
        for place in [Path(one).resolve() for one in inputs if os.path.isdir(one)]:
            if target == place or target in place.parents:
                raise FileError(f"{target} holds what is to be merged; name another folder")
        if target.exists() and not target.is_dir():
            raise FileError(f"{target} is a file; name a folder that is not there yet")
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise FileError(
                f"{target} is not empty; name another folder, or say that it may be overwritten"
            )
        self.target, self.digest = target, digest
        self.around = target.with_name(f"{target.name}.partial")
        self.folder = self.around / "model"
        self.done: list[str] = []
        self.probed: dict[str, float | None] = {}  # layers that are merged, and their probes
        self.lock = locked(self.around, 0)

    def __enter__(self) -> Working:
        self.around.mkdir(parents=True, exist_ok=True)
        self.lock.__enter__()
        try:
            self._resume()
        except BaseException as error:
            self.lock.__exit__(type(error), error, None)
            raise
        return self

    def _resume(self) -> None:
        try:
            before = json.loads((self.around / NOTE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            before = {}
        found = [path for path in self.around.iterdir() if not path.name.startswith(f".{NOTE}")]
        if found and not before:
            raise FileError(f"{self.around} is not of a merge; remove it, or name another folder")
        done = before.get("done", []) if before.get("of") == self.digest else []
        if all((self.folder / name).is_file() for name in done):
            self.done, self.probed = list(done), dict(before.get("probed", {}))
        self.note()
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():  # what a crash has left half done
            if path.name not in self.done:
                path.unlink() if path.is_file() else shutil.rmtree(path)

    def note(self, *more: str) -> None:
        """Files are written."""
        self.done += more
        what = {"of": self.digest, "done": self.done, "probed": self.probed}
        with replacing(self.around / NOTE) as file:
            file.write(json.dumps(what).encode())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._leave(error)
        finally:
            self.lock.__exit__(kind, error, trace)

    def _leave(self, error: Any) -> None:
        if error is None:
            self.done = []  # what lies there from now on is no part of this run
            self.note()
            exchange(self.folder, self.target)
        elif isinstance(error, OSError) and error.errno is not None:
            raise FileError(
                f"the merged model could not be written to {self.target}: {error}. What was there "
                f"before is intact, and what is done is kept in {self.around}: make room and run "
                "it again to go on"
            ) from error
        if error is None or isinstance(error, (FileError, MergeError)):
            shutil.rmtree(self.around)


def _digest(shards: list[Shard], adapter: Any) -> str:
    """What a run is of: another base or adapter makes it another one."""
    facts: list[Any] = [__version__, str(adapter)]
    for shard in shards:
        stat = shard.path.stat()
        facts.append([str(shard.path.resolve()), stat.st_size, stat.st_mtime_ns])
    folder = Path(adapter)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            facts.append([str(path.relative_to(folder)), content])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _built(kind: Any, config: Any, adapter: Any, loading: dict[str, Any]) -> Any:
    """The model without memory, with the vocabulary that the adapter was saved with."""
    from accelerate import init_empty_weights

    def build() -> Any:
        with init_empty_weights():
            make = getattr(kind, "from_config", None) or kind._from_config
            return make(copy.deepcopy(config)).eval()

    model = build()
    table: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    path = next((n for n, m in model.named_modules() if m is table), None)
    source = Source(adapter, loading.get("subfolder"))
    held = read_tensors(source, allow_pickle=bool(loading.get("allow_pickle")))
    for key in (f"{PREFIX}{path}.weight", f"{PREFIX}{path}.base_layer.weight"):
        if key in held and held[key].shape[0] != table.weight.shape[0]:
            config.get_text_config().vocab_size = held[key].shape[0]
            model = build()
    return model


def _merge(
    plan: Plan, shard: Shard, work: Working, found: Merged, extra: dict[str, Tensor]
) -> None:
    """Write one file; what its tensors are besides, where that is something else now, is
    ``extra``."""
    done = shard.path.name in work.done
    pieces: list[Piece] = []
    samples: dict[str, Tensor] = {}
    for key, entry in shard.entries.items():
        own = plan.names.get(key, [])
        name = own[0] if own else key
        value = plan.values.get(name)
        same = value is None or tuple(value.shape) == entry.shape
        if same and not any(one in plan.changed for one in own):
            found.copied += 1
            pieces.append(Piece(name, entry.kind, entry.shape, source=shard, key=key))
            continue
        if value is not None and not same and bool(torch.isnan(value).any()):
            raise MergeError(
                f"{key} is {entry.shape} in {shard.path}, and {tuple(value.shape)} by the config; "
                "take the base that the adapter was trained on"
            )
        found.changed.append(name)
        compute = _value(plan, shard, own, extra)
        if done and len(own) > 1:
            compute()
        shape = entry.shape if value is None else tuple(value.shape)
        pieces.append(Piece(name, entry.kind, shape, value=compute))
    if done:
        found.resumed += 1
    else:
        path = work.folder / shard.path.name
        write(path, [sampled(one, samples) for one in pieces], {"format": "pt", **shard.metadata})
        read_back(path, samples)
        work.probed = dict(found.report.ratios)
        work.note(shard.path.name)
    shard.forget()


def _value(
    plan: Plan, shard: Shard, own: list[str], extra: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """Computes a tensor of the files; what it is for other parameters goes to ``extra``."""

    def compute() -> Tensor:
        first, *others = [plan.value(name) for name in own]
        for name, value in zip(own[1:], others, strict=True):
            if not torch.equal(first, value):
                extra[name] = value.detach().clone()
        for name in own:
            plan.written(name)
        shard.forget()
        return first

    return compute


def _add(plan: Plan, work: Working, found: Merged, extra: dict[str, Tensor]) -> None:
    """Write what the base's files did not have, and an index of all files where there are several.

    Raises:
        MergeError: the files lack a tensor, and the adapter has none in its place.
    """
    known = {name for names in plan.names.values() for name in names}
    converted = any(key not in plan.names for key in plan.where)
    for name in [*plan.changed, *plan.lacking]:
        if name in known or name in extra:
            continue
        if name in plan.changed:
            extra[name] = plan.value(name).detach()
        elif not converted:
            raise MergeError(
                f"neither the base model's files nor the adapter hold {name}, so it would be "
                "random; take the base that the adapter was trained on"
            )
    found.added = sorted(extra)
    names = sorted(work.folder.glob("*.safetensors"))
    if extra:
        more = work.folder / "added.safetensors"
        pieces = [
            Piece(name, KINDS[value.dtype], tuple(value.shape), value=partial(_the, value))
            for name, value in extra.items()
        ]
        write(more, pieces, {"format": "pt"})
        for i, path in enumerate(names := [*names, more]):
            os.replace(path, work.folder / f"model-{i + 1:05}-of-{len(names):05}.safetensors")
    names = sorted(work.folder.glob("*.safetensors"))
    if [path.name for path in names] != [SINGLE]:
        entries = {path: Shard(path).entries for path in names}
        size = sum(one.end - one.begin for own in entries.values() for one in own.values())
        weights = {key: path.name for path, own in entries.items() for key in own}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=2)
        (work.folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _the(value: Tensor) -> Tensor:
    return value


def _write_rest(source: Path, adapter: Any, model: Any, extra: Any, work: Path) -> None:
    copy_rest(source, adapter, work)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if any(name in extra for name in getattr(model, "all_tied_weights_keys", None) or {}):
        config.tie_word_embeddings = False  # else loading would tie them again
    config.save_pretrained(work)


def copy_rest(source: Path, adapter: Any, work: Path) -> None:
    """What else lies in the folders: a tokenizer is the adapter's, if it has one."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS) and not path.name.startswith("."):
            shutil.copyfile(path, work / path.name)
    folder = Path(adapter)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file() and path.name.startswith(TOKENS):
            shutil.copyfile(path, work / path.name)
