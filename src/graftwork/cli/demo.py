"""``graft demo``: an English-only encoder learns to tell many languages apart, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, guarded, show_json

if TYPE_CHECKING:
    from ..train.demo import Shown


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(guarded(demo))


def demo(
    output: Annotated[str, typer.Option(help="folder to write")] = "graft-demo",
    samples: Annotated[int, typer.Option(help="samples to train on", min=100)] = 36_000,
    seed: Annotated[int, typer.Option(help="decides everything", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier demo")] = False,
    json: Json = False,
) -> None:
    """Teach an English-only encoder to tell many languages apart; offline, in a few minutes."""
    from pathlib import Path

    from ..train import show
    from ..train.demo import run

    screen = show.Silent() if json else show.Terminal(show.stderr())
    try:
        shown = run(Path(output), screen, seed, samples, overwrite)
    finally:
        screen.close()
    if json:
        show_json(_json(shown))
    else:
        _print(shown)


def _print(shown: Shown) -> None:
    from rich.table import Table

    from ..train import show
    from ..train.run import near, program

    result = shown.result
    made, prepared = result.prepared.plan, result.prepared
    count, tested = len(prepared.spec.labels), len(prepared.corpus.test)
    console = show.stdout()
    console.print(
        f"\n[bold]An encoder that read only English learns to tell {count} languages apart[/bold]\n"
        f"by {len(prepared.corpus.train):,} samples of two names each; tested on {tested:,} "
        "samples of names it has never seen\n"
    )
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("")
    for name in ("accuracy", "trained", "time"):
        table.add_column(name, justify="right")
    before = result.before["accuracy"]
    rows = [
        (f"before training (chance is {1 / count:.1%})", before, "", ""),
        ("frozen encoder, trained head", shown.frozen, f"{shown.frozen_parameters:,}",
         show.clock(shown.frozen_seconds)),
        ("[bold]LoRA[/bold]", result.after["accuracy"], f"{made.trainable:,}",
         show.clock(result.seconds)),
    ]  # fmt: skip
    for name, accuracy, trained, seconds in rows:
        table.add_row(name, f"{accuracy:.1%}", trained, seconds)
    console.print(table)
    console.print()
    for line in _facts(shown):
        console.print(line, soft_wrap=True)
    console.print()
    for prediction, truth in zip(shown.predictions, shown.truth, strict=True):
        share = prediction.probabilities[prediction.label]
        verdict = "" if prediction.label == truth else f"  (it is {truth})"
        console.print(
            f"  {prediction.text}\n    {prediction.label}, {share:.0%}{verdict}", markup=False
        )
    folder = near(result.output)
    console.print(
        f'\nnext  {program()} predict {folder} "Schweizer Franken, Montag"', soft_wrap=True
    )


def _facts(shown: Shown) -> list[str]:
    from ..train import show

    result = shown.result
    made, tested = result.prepared.plan, len(result.prepared.corpus.test)
    base = made.memory.weights
    return [
        f"adapter   {show.size(result.size)} beside a base of {show.size(base)}; "
        f"{made.share:.2%} of the parameters are trained",
        f"merged    the same answer to {shown.agreeing:,} of {tested:,} (probabilities differ by "
        f"{shown.difference:.0e} at most)",
        f"took      {show.clock(shown.seconds)} in all, peak memory {show.size(shown.peak)}",
    ]


def _json(shown: Shown) -> dict[str, Any]:
    from ..train import show

    return {
        "training": show.result_json(shown.result),
        "frozen_accuracy": shown.frozen,
        "frozen_parameters": shown.frozen_parameters,
        "frozen_seconds": round(shown.frozen_seconds, 3),
        "merged_agreeing": shown.agreeing,
        "merged_difference": shown.difference,
        "predictions": [
            {"text": p.text, "label": p.label, "truth": truth}
            for p, truth in zip(shown.predictions, shown.truth, strict=True)
        ],
        "seconds": round(shown.seconds, 3),
        "peak_bytes": shown.peak,
    }
