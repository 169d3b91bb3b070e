"""What ``graft merge`` does: find the base model of an adapter, and merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files.folder import config_of
from ..files.hub import Source
from .merge import Merged, Working, copy_rest, merge_files
from .plan import leaves

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")


def merged(
    adapter: str,
    output: str,
    model: str | None,
    num_labels: int | None,
    in_memory: bool,
    overwrite: bool,
    on_file: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge an adapter into its base model.

    Args:
        adapter: its folder.
        output: the folder to write.
        model: the base model's folder or hub id; None: the one that the adapter names.
        num_labels: of a classifier; None: what ``graft train`` noted.
        in_memory: load the whole model.
        overwrite: replace what is at ``output``.
        on_file: called with how many files are written, and how many there are.

    Raises:
        FileError: the adapter does not name its base, or files do not fit.
        RecipeError: the base model is not there.
    """
    path = Path(adapter).expanduser()
    if path.is_dir():
        adapter = str(path)
    base, revision, kind, config = _base(path, adapter, model, num_labels)
    if in_memory:
        return _whole(base, revision, adapter, output, kind, config, overwrite)
    return merge_files(
        _folder(base, revision), adapter, output, kind, config, overwrite=overwrite, on_file=on_file
    )


def _base(
    path: Path, adapter: str, model: str | None, num_labels: int | None
) -> tuple[str, str | None, Any, Any]:
    """Where the base model is, its revision, its class and its config."""
    import transformers

    from ..model.auto import AutoPeftModel
    from ..train import base, bundle, tasks
    from ..train.recipe import RecipeError

    if (path / bundle.NOTE).is_file():
        if num_labels is not None:
            raise RecipeError(f"--num-labels: {path / bundle.NOTE} says it already; leave it out")
        note = bundle.read(path)
        task, source = tasks.TASKS[note.spec.task], base.resolve(model or note.base)
        changes = task.config(note.spec, base.load_tokenizer(str(path)))
        revision = note.recipe.revision if model is None else None
        config = base.load_config(source, revision, **changes)
        return source, revision, getattr(transformers, task.model_class), config
    own = config_of(Source(adapter))
    named = model or own.base_model_name_or_path
    if not named:
        raise FileError(f"{adapter} does not say which base model it is for; give --model")
    source, revision = base.resolve(named), own.revision if model is None else None
    changes = {} if num_labels is None else {"num_labels": num_labels}
    config = base.load_config(source, revision, **changes)
    return source, revision, AutoPeftModel._loader(own, adapter), config


def _folder(source: str, revision: str | None) -> str:
    """A model's folder here, fetched from the hub where it is a hub id."""
    if Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(source, revision=revision, allow_patterns=list(PATTERNS))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileError(f"{source} cannot be fetched from the hub: {error}") from error


def _whole(
    source: str, revision: str | None, adapter: str, output: str, kind: Any, config: Any,
    overwrite: bool,
) -> Merged:  # fmt: skip
    """Merge with the whole model in memory."""
    from ..model.peft_model import PeftModel

    target = Path(output).expanduser().resolve()
    with Working(target, "in memory", overwrite, (source, adapter)) as work:
        loaded = kind.from_pretrained(source, revision=revision, config=config, dtype="auto")
        adapted: Any = PeftModel.from_pretrained(loaded, adapter)
        names = {f"{p}.{n}" for p, h in adapted.base_model.hosts().items()
                 for n in leaves(h, tuple(adapted.active_adapters))}  # fmt: skip
        plain = adapted.merge_and_unload()
        copy_rest(Path(_folder(source, revision)), adapter, work.folder)
        plain.save_pretrained(work.folder)
    report = adapted.merge_report
    return Merged(target, sorted(names), len(plain.state_dict()) - len(names), report=report)
