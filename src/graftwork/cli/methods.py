"""``graft methods``: what there is, and the options of each."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from .common import Json, guarded, show_json


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
    from ..table import METHODS

    if matrix:
        from .. import capabilities

        show_json(capabilities.load()) if json else print(capabilities.text(), flush=True)
        return
    if method is not None:
        _options(method.upper().replace("-", "_"), json)
        return
    if json:
        show_json([{"name": m.name, "about": m.about, "paper": m.paper} for m in METHODS.values()])
        return
    width = max(map(len, METHODS))
    for row in METHODS.values():
        paper = f"  (arXiv {row.paper})" if row.paper[:1].isdigit() else ""
        print(f"{row.name:<{width}}  {row.about}{paper}")
    print("\noptions of one: graft methods LORA", flush=True)


def _options(name: str, as_json: bool) -> None:
    from ..train import options

    config = options.config_class(name)
    chosen = options.defaults(name)
    rows = []
    for f in fields(config):
        if f.name in options.names_of(name):
            default = chosen.options.get(f.name, _default(f))
            rows.append({"name": f.name, "type": str(f.type), "default": default})
    if as_json:
        show_json({"name": name, "options": rows})
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        flag = f"--{str(row['name']).replace('_', '-')}"
        print(f"{flag:<{width + 2}}  {row['default']!s}")
    print(f"\nlearning rate  {chosen.rate:g} (classification), {chosen.language_rate:g} (language)")


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
