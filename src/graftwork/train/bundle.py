"""What lies beside an adapter, so that using it needs nothing but its folder: the tokenizer, and
``graftwork.json`` with the recipe, the task, the labels, the base model and the metrics.

A folder is written as a whole: everything is put together in ``FOLDER.partial``, where checkpoints
live as well, and renamed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import FileError, did_you_mean
from ..files import schema
from ..files.atomic import exchange, replacing
from ..files.bounded import content, parsed, read_json, shown
from .recipe import Recipe, RecipeError
from .tasks import TASKS, Spec

NOTE = "graftwork.json"
FORMAT = 1
RECIPE = "recipe.json"
DONE = "result"


@dataclass(frozen=True)
class Note:
    """The content of ``graftwork.json``.

    Args:
        recipe: what the adapter was trained by, with absolute paths.
        spec: the task, its labels, columns, template and limit.
        base: the base model's folder or hub id.
        precision: in which it was trained.
        metrics: ``before`` and ``after``, and figures of the run.
    """

    recipe: Recipe
    spec: Spec
    base: str
    precision: str
    metrics: dict[str, Any]


def write(folder: Path, note: Note) -> None:
    """Write ``graftwork.json`` into a folder."""
    packages = ("torch", "transformers", "datasets")
    said = {
        "format": FORMAT,
        "graftwork": __version__,
        "versions": {name: version(name) for name in packages},
        "base": note.base,
        "spec": note.spec.to_dict(),
        "precision": note.precision,
        "recipe": note.recipe.explicit,
        "metrics": note.metrics,
    }
    text = json.dumps(said, indent=2, ensure_ascii=False)
    (folder / NOTE).write_text(text + "\n", encoding="utf-8")


def read(folder: str | os.PathLike[str]) -> Note:
    """The note in an adapter's folder.

    Raises:
        RecipeError: there is no such folder, or ``graft train`` did not write it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"there is no folder {folder}{did_you_mean(path.name, names)}")
    if not (path / NOTE).is_file():
        if (path / "adapter_config.json").is_file():
            raise RecipeError(
                f"{folder} is an adapter, but not one that `graft train` wrote: {NOTE} with its "
                "task and labels is missing. Load it in Python with AutoPeftModel.from_pretrained"
            )
        raise RecipeError(f"{folder} holds no adapter ({NOTE} and adapter_config.json are missing)")
    return noted(content(path / NOTE), path / NOTE)


def noted(text: bytes, where: Any) -> Note:
    """The note that the text of a file says; ``where``: the file, for messages.

    Raises:
        RecipeError: it says none.
    """
    from .recipe import build

    try:
        found = parsed(text, where)
        if found["format"] > FORMAT:
            raise RecipeError(
                f"{where} was written by graftwork {shown(found['graftwork'])}, which is newer "
                f"than this one ({__version__}); upgrade with `pip install -U graftwork`"
            )
        if not isinstance(found["recipe"], dict):
            raise TypeError("its recipe is no object")
        recipe, _ = build(found["recipe"])
        spec = Spec.from_dict(found["spec"])
        if spec.task not in TASKS:
            raise RecipeError(f"{where} names the task {shown(spec.task)}, which is not known")
        metric, metrics = TASKS[spec.task].metric, found["metrics"]
        numbers = [metrics[when][metric] for when in ("before", "after")]
        texts = found["base"], found["precision"]
        if not schema.fits(numbers, list[float]) or not schema.fits([*texts], list[str]):
            raise TypeError("its base, precision or metrics are of another kind")
        return Note(recipe, spec, *texts, metrics)
    except RecipeError:
        raise
    except (FileError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:500]}"
        raise RecipeError(f"{where} is damaged: {reason}") from error


class Place:
    """The output folder of a training and the working folder beside it.

    Args:
        output: the folder to write.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output).expanduser().resolve()
        self.work = self.output.with_name(f"{self.output.name}.partial")

    def check_free(self, overwrite: bool) -> None:
        """Refuse to write where something else is.

        Raises:
            RecipeError: the folder is in use; the text says by what.
        """
        out = self.output
        if out.exists() and not out.is_dir():
            raise RecipeError(f"--output: {out} is a file; name a folder that is not there yet")
        if out.is_dir() and any(out.iterdir()):
            ours = (out / NOTE).is_file()
            if not ours:
                raise RecipeError(
                    f"--output: {out} already holds other things ({_some(out)}), which are not "
                    "touched; name a folder that is not there yet"
                )
            if not overwrite:
                raise RecipeError(
                    f"--output: {out} already holds a trained adapter; name another folder, or "
                    "replace it with --overwrite"
                )
        if _in_use(self.work) and not overwrite:
            if (self.work / RECIPE).is_file():
                raise RecipeError(
                    f"--output: an unfinished training of {out.name} lies in {self.work}; go on "
                    "with --resume, or start again with --overwrite"
                )
            raise RecipeError(
                f"--output: {self.work} is in the way; remove it or choose another name"
            )

    def begin(self, recipe: Recipe) -> None:
        """Make the working folder and note the recipe in it."""
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        text = json.dumps(recipe.explicit, indent=2, ensure_ascii=False)
        with replacing(self.work / RECIPE) as file:
            file.write(f"{text}\n".encode())

    def begun(self) -> dict[str, Any]:
        """The recipe of an unfinished training.

        Raises:
            RecipeError: there is none.
        """
        path = self.work / RECIPE
        if not path.is_file():
            done = (self.output / NOTE).is_file()
            raise RecipeError(
                f"--resume: {self.output} is finished; measure it with `graft eval {self.output}`"
                if done
                else f"--resume: there is no unfinished training of {self.output} "
                f"({self.work} is not there)"
            )
        return read_json(path)

    def abandon(self) -> None:
        """Remove the working folder, unless a training can be resumed from it."""
        from .loop import last_checkpoint

        if self.work.is_dir() and last_checkpoint(self.work) is None:
            shutil.rmtree(self.work)

    def finish(self, made: Path) -> None:
        """Put the finished folder in its place and remove what was needed to make it."""
        exchange(made, self.output)
        shutil.rmtree(self.work)


def _in_use(work: Path) -> bool:
    """Whether there is more than what a crash at the very beginning leaves."""
    if not work.is_dir():
        return work.exists()
    return any(not path.name.startswith(f".{RECIPE}") for path in work.iterdir())


def _some(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
