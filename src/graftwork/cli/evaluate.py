"""``graft eval``: the metric of an adapter on the data held out in training, or on other data."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Folder, Json, guarded, message, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(guarded(evaluate))


def evaluate(
    folder: Folder,
    data: Annotated[
        str | None, typer.Option(help="other data to measure it by", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Measure an adapter on the data that was held out in training, or on other data."""
    from ..train import show, use

    found = use.evaluate(use.load(folder), data)
    if found.long:
        message(f"{found.long:,} of {found.count:,} texts are longer than the limit")
    if found.changed:
        message("training measured other values on this data; has it changed since?")
    if json:
        show_json({"metrics": found.metrics, "count": found.count, "source": found.source})
        return
    for name, number in found.metrics.items():
        print(f"{name:<12}{show.value(name, number):>10}")
    print(f"on {found.count:,} examples ({found.source})")
