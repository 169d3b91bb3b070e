"""``graft predict``: the labels that a trained classifier gives to texts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .common import Folder, Json, guarded, message, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("predict")(guarded(predict))


def predict(
    folder: Folder,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="texts; without any, each line of stdin is one", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="labels to show for a text", min=1)] = 3,
    json: Json = False,
) -> None:
    """Classify texts with a trained adapter."""
    from ..train import use
    from ..train.recipe import RecipeError

    given = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not given:
        raise RecipeError("there is no text to classify; give one, or lines on stdin")
    found, long = use.predict(use.load(folder), given)
    if long:
        message(f"{long} of {len(given)} texts are longer than the limit and were cut at the end")
    if json:
        show_json(
            [{"text": p.text, "label": p.label, "probabilities": p.probabilities} for p in found]
        )
        return
    for p in found:
        best = list(p.probabilities.items())[:top]
        told = "  ".join(f"{label} {share:.1%}" for label, share in best)
        print(f"{told}" if len(found) == 1 else f"{told}\t{p.text}")
