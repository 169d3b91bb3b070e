"""``graft generate``: what a trained language model writes."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Folder, Json, guarded, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(guarded(generate))


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="the prompt", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="at most so many tokens", min=1)] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="for temperatures above 0", min=0)] = 0,
    json: Json = False,
) -> None:
    """Let a trained language model answer a prompt."""
    from ..train import use

    text = use.generate(use.load(folder), prompt, max_new_tokens, temperature, seed)
    if json:
        show_json({"prompt": prompt, "text": text})
    else:
        print(text)
