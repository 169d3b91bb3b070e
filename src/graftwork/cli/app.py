"""The commands, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import demo, evaluate, generate, inspect, merge, methods, predict, train


def build(words: Sequence[str] | None = None) -> typer.Typer:
    """The application with all its commands.

    Args:
        words: what the user has typed; "train" has its options only where it is among them. None:
            it has them.
    """
    app = typer.Typer(
        name="graft",
        help="Fine-tune a model with few parameters, and use the result.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage. GRAFT_DEBUG=1 shows tracebacks.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    train.register(app, named=words is None or "train" in words)
    for module in (evaluate, predict, generate, merge, inspect, methods, demo):
        module.register(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"graftwork {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show it")
    ] = False,
) -> None:
    """Fine-tune a model with few parameters, and use the result."""
