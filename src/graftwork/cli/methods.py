"""``graft methods``: what there is, and the options of each."""

from __future__ import annotations

import shutil
from dataclasses import fields
from textwrap import fill, wrap
from typing import Annotated

import typer

from .common import Json, guarded, show_json

WIDEST = 100  # columns that text takes at most


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("methods")(guarded(methods))


def methods(
    method: Annotated[
        str | None, typer.Argument(help="show the options of this one", show_default=False)
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="what each method can do, beside what PEFT's can")
    ] = False,
    json: Json = False,
) -> None:
    """List the methods, or the options of one."""
    if method is not None:
        _one(method.upper().replace("-", "_"), matrix, json)
    elif matrix:
        from .. import capabilities

        show_json(capabilities.load()) if json else print(capabilities.text(), flush=True)
    else:
        _all(json)


def _all(as_json: bool) -> None:
    from ..table import METHODS

    if as_json:
        keys = ("name", "family", "about", "paper")
        show_json([{key: getattr(row, key) for key in keys} for row in METHODS.values()])
        return
    width, family = max(map(len, METHODS)), None
    for row in METHODS.values():
        if row.family != family:
            print(f"{'' if family is None else chr(10)}{row.family}")
            family = row.family
        print(f"  {row.name:<{width}}  {row.about}")
    print(
        "\noptions of one: graft methods LORA; what each can do: graft methods --matrix", flush=True
    )


def _one(name: str, matrix: bool, as_json: bool) -> None:
    from .. import capabilities
    from ..config import TargetConfig
    from ..meaning import default_of, meanings
    from ..train import options
    from ..train.defaults import defaults

    config = options.config_class(name)
    if matrix and as_json:
        show_json({who: table.get(name, {}) for who, table in capabilities.load().items()})
        return
    if matrix:
        print("\n".join(fill(line, _columns()) for line in capabilities.told(name)), flush=True)
        return
    chosen, means = defaults(name), meanings(config)
    shared = {f.name for f in fields(TargetConfig)}
    rows = [
        {
            "name": f.name,
            "type": str(f.type),
            "default": chosen.options.get(f.name, default_of(f)),
            "meaning": means.get(f.name, "").replace("``", ""),
        }
        for f in sorted(fields(config), key=lambda f: f.name in shared)
        if f.name in options.names_of(name)
    ]
    if as_json:
        show_json({"name": name, "options": rows})
        return
    _heading(name)
    for row in rows:
        if row["name"] == "target_modules":
            print("\nof every method:")
        _option(row["name"], row["default"], row["meaning"])
    rates = f"{chosen.rate:g} (classification), {chosen.language_rate:g} (language)"
    print(f"\nlearning rate  {rates}; of a new head {chosen.head_rate:g}", flush=True)


def _heading(name: str) -> None:
    from ..table import METHODS

    row = METHODS[name]
    paper = f"arXiv {row.paper}" if row.paper[:1].isdigit() else row.paper
    told = f"{name}: {row.about}{f' ({paper})' if paper else ''}"
    print(f"{fill(told, _columns())}\n")


def _option(name: str, default: object, meaning: str) -> None:
    """One line for an option and its default, and its meaning, further lines where it is long."""
    flag = f"--{name.replace('_', '-')}"
    front = f"{flag:<27} {default!s:<12}  "
    width = max(30, _columns() - len(front))
    head, *rest = wrap(meaning, width, break_on_hyphens=False) or [""]
    print(f"{front}{head}".rstrip())
    for line in rest:
        print(f"{'':<{len(front)}}{line}")


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)
