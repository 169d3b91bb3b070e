"""``graft train``: every field of the recipe is a flag, and so is every option of the method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

from .common import guarded, message, show_json

HELP = """Train an adapter.

Give flags, or one YAML file whose keys are the flags, or both; flags win. The options of the
method are flags as well: `graft methods LORA` lists those of LoRA.

[bold]Examples[/bold]

  graft train --model distilbert-base-uncased --data reviews.csv

  graft train recipe.yaml --method LORA --r 16 --target-modules q_proj,v_proj --output out
"""
OUT = "Running"


def register(app: typer.Typer, named: bool = True) -> None:
    """Add the command; with its options, which take long to import, where it is named."""
    app.command(
        "train",
        help=HELP,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(command() if named else lambda: None)


def command() -> Callable[..., None]:
    """The command's function, with a parameter for each field of the recipe."""
    from ..train.recipe import FIELDS

    @guarded
    def train(ctx: typer.Context, **given: Any) -> None:
        resume, plan_only, as_json = (given.pop(k) for k in ("resume", "plan", "json"))
        flags = {key: value for key, value in given.items() if value is not None}
        path, extra = split(ctx.args)
        _run(path, {**flags, **extra}, resume, plan_only, as_json)

    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    ]
    for name, field in FIELDS.items():
        parameters.append(_parameter(name, _plain(field.annotation), str(field.description)))
    running = [
        ("resume", "go on with a training that was stopped"),
        ("plan", "show the plan and stop"),
        ("json", "print one JSON value instead of text"),
    ]
    for name, text in running:
        option = typer.Option(f"--{name}", help=text, rich_help_panel=OUT)
        parameters.append(_keyword(name, Annotated[bool, option], False))
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    return train


def _plain(annotation: Any) -> type:
    """The type that the command line reads: the field's, without None; a choice is a text."""
    kinds = [a for a in get_args(annotation) if isinstance(a, type) and a is not type(None)]
    return annotation if isinstance(annotation, type) else kinds[0] if kinds else str


def _parameter(name: str, kind: type, text: str) -> inspect.Parameter:
    from ..train.recipe import FIELDS, group_of

    flag, default = f"--{name.replace('_', '-')}", FIELDS[name].default
    shown = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    # numbers are read by the recipe, whose errors say what is wanted
    read = bool if kind is bool else str
    option = typer.Option(
        flag,
        help=f"{text} [dim](default {default})[/dim]" if shown else text,
        rich_help_panel=group_of(name),
        show_default=False,
        metavar={bool: None, int: "N", float: "X"}.get(kind, "TEXT"),
    )
    return _keyword(name, Annotated[read | None, option], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def split(words: list[str]) -> tuple[str | None, dict[str, Any]]:
    """A recipe file, if the words begin with one, and the options among them.

    Raises:
        RecipeError: a word belongs to no option.
    """
    from ..train.recipe import RecipeError

    path = words[0] if words and not words[0].startswith("-") else None
    options: dict[str, Any] = {}
    rest = words[1:] if path else list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise RecipeError(
                f"{word!r} belongs to no option; options begin with --, and a recipe file comes "
                "first"
            )
        name, equals, value = word[2:].partition("=")
        if not equals:
            has_value = rest and not rest[0].startswith("--")
            options[name.replace("-", "_")] = rest.pop(0) if has_value else True
        else:
            options[name.replace("-", "_")] = value
    return path, options


def _run(
    path: str | None, flags: dict[str, Any], resume: bool, plan_only: bool, as_json: bool
) -> None:
    from ..train.recipe import build, read_yaml

    file = read_yaml(path) if path else {}
    if resume:
        from ..train.run import resumed

        recipe = resumed({**file, **flags})
    else:
        recipe, remarks = build(flags, file, path or "")
        for remark in remarks:
            message(remark)
    from ..fast import heap
    from ..train import show
    from ..train.prepare import prepare
    from ..train.run import train

    screen = show.Silent() if as_json else show.Terminal(show.stderr())
    try:
        if plan_only:
            prepared = prepare(recipe, screen.say)
            screen.plan(prepared)
            if as_json:
                show_json(show.plan_json(prepared))
            return
        heap.keep()  # this process does nothing else
        found = train(recipe, screen, resume)
    finally:
        screen.close()
    if as_json:
        show_json(show.result_json(found))
    else:
        show.result(found, show.stdout())
