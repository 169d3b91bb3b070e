"""``graft merge``: a base model's folder with an adapter merged into its weights."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, guarded, show_json

if TYPE_CHECKING:
    from ..merging import Merged


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge")(guarded(merge))


def merge(
    folder: Annotated[str, typer.Argument(help="an adapter's folder", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="folder to write", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="base model; by default the one that the adapter names", show_default=False
        ),
    ] = None,
    num_labels: Annotated[
        int | None,
        typer.Option(
            help="labels of a classifier that `graft train` did not write",
            show_default=False,
            min=1,
        ),
    ] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="load the whole model instead of its files by turns")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="replace what is at --output")] = False,
    json: Json = False,
) -> None:
    """Merge an adapter into its base model, file by file, into a folder for plain transformers."""
    from ..merging.command import merged

    found = merged(
        folder, output, model, num_labels, in_memory, overwrite, _show if not json else None
    )
    if json:
        show_json(_json(found))
        return
    added = f", {len(found.added)} added" if found.added else ""
    resumed = f" ({found.resumed} files were there already)" if found.resumed else ""
    print(f"{found.output}: {len(found.changed)} tensors merged, {found.copied} as they were{added}"
          f"{resumed}")  # fmt: skip
    report = found.report
    print(f"probed {report.probed} of {len(report.sites)} layers: outputs differ by "
          f"{report.difference:.2g} of what rounding allows")  # fmt: skip


def _show(done: int, every: int) -> None:
    if every > 1 and sys.stderr.isatty():
        end = "\n" if done == every else ""
        print(f"\r{done} of {every} files", end=end, file=sys.stderr, flush=True)


def _json(found: Merged) -> dict[str, Any]:
    return {
        "output": str(found.output),
        "changed": found.changed,
        "copied": found.copied,
        "added": found.added,
        "resumed": found.resumed,
        "layers": len(found.report.sites),
        "probed": found.report.probed,
        "difference": found.report.difference,
    }
