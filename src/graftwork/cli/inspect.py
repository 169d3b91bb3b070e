"""``graft inspect``: what is in an adapter's folder; of prompts, what their virtual tokens say."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, guarded, message, show_json

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..config import PeftConfig
    from ..files.contents import Group, Held
    from ..prompts.nearest import NearestTokens
    from ..prompts.norms import LayerNorms
    from ..train.bundle import Note

NEAREST = 5  # tokens shown for a virtual token
SHOWN = 8  # entries of a list in a config


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(guarded(inspect))


@dataclass
class Found:
    """What is known of an adapter.

    Args:
        folder: where it lies.
        config: its config.
        held: its tensors.
        size: bytes of its weights.
        groups: the tensors by their places.
        changed: fields of the config that are not at their defaults.
        note: of its training by ``graft train``; None where something else wrote it.
        base: the base model.
        kind: the base model's class.
        nearest: tokens near to its virtual tokens.
        norms: of what it holds for each attention.
        remarks: what could not be shown.
    """

    folder: str
    config: PeftConfig
    held: list[Held]
    size: int
    groups: list[Group]
    changed: dict[str, Any]
    note: Note | None
    base: str | None
    kind: str | None
    nearest: NearestTokens | None = None
    norms: list[LayerNorms] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def inspect(
    folder: Annotated[str, typer.Argument(help="an adapter's folder", show_default=False)],
    nearest: Annotated[
        int | None,
        typer.Option(
            help="tokens to show for each virtual token of a prompt; 5 by default, 0 for none",
            min=0,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="base model, for those tokens; by default the one that the adapter names",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what is in an adapter's folder, and which tokens its virtual tokens are near to."""
    found = _found(folder)
    _look_inside(found, nearest, model)
    for remark in found.remarks:
        message(remark)
    if json:
        show_json(_json(found))
    else:
        _print(found)


def _found(folder: str) -> Found:
    """What the config and the header of the weights say."""
    from pathlib import Path

    from ..files.atomic import settled
    from ..files.contents import changed, grouped, read_header
    from ..files.folder import config_of, note_of
    from ..files.hub import Source
    from ..train import bundle

    path = Path(folder).expanduser()
    folder = _checked(path, folder)
    source = Source(folder)
    config, (held, size), told = settled(
        source.at, lambda: (config_of(source), read_header(source), note_of(source))
    )
    note = bundle.read(path) if (path / bundle.NOTE).is_file() else None
    named = config.base_model_name_or_path if note is None else note.base
    kind = (told.get("identity") or {}).get("class")
    groups, options = grouped(config, held), changed(config)
    return Found(folder, config, held, size, groups, options, note, named or None, kind)


def _checked(path: Path, folder: str) -> str:
    """A folder with an adapter, or a hub id.

    Raises:
        RecipeError: it is neither.
    """
    from ..errors import did_you_mean
    from ..train.recipe import RecipeError

    if (path / "adapter_config.json").is_file() or (not path.exists() and folder.count("/") == 1):
        return str(path)
    if not path.is_dir():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")])
        raise RecipeError(f"there is no folder {folder}{near}")
    if inner := sorted(p.parent.name for p in path.glob("*/adapter_config.json")):
        raise RecipeError(
            f"{folder} holds no adapter itself, but its folders do: {', '.join(inner)}; give one "
            f"of them, such as {path / inner[0]}"
        )
    what = "is a base model's folder" if (path / "config.json").is_file() else "holds no adapter"
    raise RecipeError(f"{folder} {what}: adapter_config.json is missing")


def _look_inside(found: Found, count: int | None, model: str | None) -> None:
    """Add what the tensors of a prompt say.

    Raises:
        RecipeError: an option has no effect with this method, or the model cannot be loaded.
        FileError: the file is another method's.
    """
    from ..errors import FileError, GraftworkError
    from ..files.folder import read_tensors
    from ..files.hub import Source
    from ..prompts.norms import holds_layers, norms_in
    from ..prompts.tokens import TokensConfig
    from ..train.recipe import RecipeError

    config, names = found.config, [one.name for one in found.held]
    if config.is_prompt_learning and "prompt_embeddings" not in names:
        raise FileError(
            f"{found.folder} holds no prompt_embeddings, which every {config.method} adapter has, "
            f"but {names[:3]}; is it the file that belongs to this adapter_config.json?"
        )
    if not isinstance(config, TokensConfig):
        for flag, value in (("--nearest", count), ("--model", model)):
            if value is not None:
                raise RecipeError(
                    f"{flag} is for virtual tokens that are embeddings, and a {config.method} "
                    "adapter holds none; leave it out"
                )
        if holds_layers(config):
            found.norms = norms_in(config, read_tensors(Source(found.folder)))
        return
    if count == 0:
        return
    try:
        found.nearest = _nearest(found, NEAREST if count is None else count, model)
    except GraftworkError as error:
        if model is not None:
            raise
        found.remarks.append(
            "the tokens that are near to the virtual ones are not shown, since that needs the "
            f"base model's embeddings: {str(error).removeprefix('--model: ')} (--model says where "
            "the base model is, --nearest 0 does without)"
        )


def _nearest(found: Found, count: int, model: str | None) -> NearestTokens:
    from pathlib import Path

    from ..files.folder import read_tensors
    from ..files.hub import Source
    from ..prompts.nearest import nearest_in
    from ..train import base, vocabulary
    from ..train.recipe import RecipeError

    source, config = model or found.base, found.config
    if source is None:
        raise RecipeError("the adapter does not name it")
    revision = config.revision if model is None else None
    table = vocabulary.load(source, revision)
    own = model is None and _has_tokenizer(found.folder)
    try:
        where = found.folder if own else base.resolve(source)
        if Path(where).is_dir() and not _has_tokenizer(where):  # transformers 5.0 invents one
            raise RecipeError(f"{where} has no tokenizer")
        tokenizer = base.load_tokenizer(where, None if own else revision)
    except RecipeError as error:
        found.remarks.append(f"tokens are shown by their numbers: {error}")
        tokenizer = None
    tensors = read_tensors(Source(found.folder))
    return nearest_in(config, tensors, table, table.num_embeddings, tokenizer, count)


def _has_tokenizer(folder: str) -> bool:
    from pathlib import Path

    path = Path(folder).expanduser()
    return any(any(path.glob(name)) for name in ("tokenizer*", "vocab*", "*.model"))


def _lines(found: Found) -> list[tuple[str, str]]:
    from ..table import METHODS
    from ..train import show

    config, note = found.config, found.note
    row = METHODS[config.method]
    total = sum(one.size for one in found.held)
    kinds = ", ".join(sorted({one.type for one in found.held}))
    kind = f" ({found.kind})" if found.kind else ""
    options = ", ".join(f"{name}={_short(value)}" for name, value in found.changed.items())
    lines = [
        ("method", f"{config.method}: {row.about}"),
        ("base", f"{found.base or 'not named'}{kind}"),
        ("task type", str(getattr(config.task_type, "value", config.task_type or "none"))),
        ("size", f"{show.size(found.size)}: {total:,} numbers in {len(found.held):,} "
                 f"tensor{'s' * (len(found.held) != 1)}, {kinds}"),
        ("options", options or "all at their defaults"),
    ]  # fmt: skip
    return lines if note is None else [*lines, ("training", _training(note))]


def _training(note: Note) -> str:
    from ..train import corpus, show
    from ..train.tasks import TASKS

    recipe, metric = note.recipe, TASKS[note.spec.task].metric
    before, after = (show.value(metric, note.metrics[when][metric]) for when in ("before", "after"))
    count = f"{recipe.steps:,} steps" if recipe.steps else f"{recipe.epochs or 1:g} epochs"
    labels = f", {len(note.spec.labels)} labels" if note.spec.labels else ""
    return (
        f"{note.spec.task}{labels}, {count} on {corpus.short(recipe.data)}; held-out {metric} "
        f"{before} before, {after} after"
    )


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > SHOWN:
        return f"[{', '.join(map(str, value[:SHOWN]))}, ... {len(value)} in all]"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _console() -> Console:
    """The terminal; a pipe gets each row as one line."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(file=sys.stdout, highlight=False, width=1000 if wide else None)


def _print(found: Found) -> None:
    from rich.table import Table

    console = _console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, text in _lines(found):
        grid.add_row(name, _plain(text))
    _show(console, grid)
    _print_groups(console, found.groups)
    if found.norms:
        _print_norms(console, found.norms)
    if found.nearest is not None:
        _print_nearest(console, found.nearest)


def _print_groups(console: Console, groups: Sequence[Group]) -> None:
    from ..files.contents import shown

    for whole, title in ((False, "places"), (True, "trained as a whole")):
        rows = [
            (f"{len(g.places)} x", g.pattern or "the whole model", "\n".join(shown(g.tensors)))
            for g in groups
            if g.whole == whole
        ]
        if rows:
            _table(console, ("", title, "tensors"), rows)


def _print_norms(console: Console, norms: Sequence[LayerNorms]) -> None:
    names = list(norms[0].norms)
    rows = [(one.layer, *(f"{one.norms[name]:.3g}" for name in names)) for one in norms]
    _table(console, ("layer", *names), rows, right=(1, 2))
    console.print(_plain("mean norms over the virtual tokens"), style="dim")


def _print_nearest(console: Console, found: NearestTokens) -> None:
    names = [
        f"{one.part} {'' if one.task is None else f'task {one.task}'} {one.place}" for one in found
    ]
    words = [[str(near) for near in one.nearest] for one in found]
    room = console.width - max(map(len, names)) - 13
    wide = [max(map(len, column)) for column in zip(*words, strict=True)]
    if sum(wide) + 2 * len(wide) > room:  # columns do not fit
        wide = [0] * len(wide)
    rows = []
    for name, one, near in zip(names, found, words, strict=True):
        text = "  ".join(f"{word:<{n}}" for word, n in zip(near, wide, strict=True))
        rows.append((name.strip(), f"{one.norm:.3g}", text if any(wide) else _flow(near, room)))
    _table(console, ("", "norm", "nearest tokens, and the cosine"), rows, right=(0, 1))
    console.print(f"the median norm of the vocabulary is {found.vocabulary_norm:.3g}", style="dim")


def _flow(words: Sequence[str], room: int) -> str:
    """Words in lines of so many columns; none is broken."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}  {word}".lstrip()
        lines = [*lines[:-1], longer] if len(longer) <= room else [*lines, word]
    return "\n".join(filter(None, lines))


def _table(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (0,),
) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    print(flush=True)
    _show(console, table)


def _show(console: Console, table: Any) -> None:
    """Print a table without the spaces that fill up its last column."""
    with console.capture() as kept:
        console.print(table)
    print("\n".join(line.rstrip() for line in kept.get().splitlines()), flush=True)


def _plain(text: str) -> Any:
    """Text as it is; brackets in it are no markup."""
    from rich.text import Text

    return Text(text)


def _json(found: Found) -> dict[str, Any]:
    config, note = found.config, found.note
    return {
        "folder": found.folder,
        "method": config.method,
        "base": found.base,
        "base_class": found.kind,
        "revision": config.revision,
        "task_type": getattr(config.task_type, "value", config.task_type),
        "bytes": found.size,
        "parameters": sum(one.size for one in found.held),
        "options": found.changed,
        "tensors": [asdict(one) for one in found.held],
        "places": [
            {"pattern": g.pattern, "count": len(g.places), "whole": g.whole} for g in found.groups
        ],
        "training": None if note is None else {
            "task": note.spec.task, "labels": note.spec.labels, "data": note.recipe.data,
            "metrics": note.metrics,
        },
        "norms": [{"layer": one.layer, **one.norms} for one in found.norms],
        "nearest": None if found.nearest is None else [asdict(one) for one in found.nearest],
        "vocabulary_norm": None if found.nearest is None else found.nearest.vocabulary_norm,
        "remarks": found.remarks,
    }  # fmt: skip
