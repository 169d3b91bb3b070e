"""What the commands share: errors without tracebacks, and output."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from ..errors import GraftworkError

F = TypeVar("F", bound=Callable[..., Any])
FAILED, WRONG = 1, 2

Json = Annotated[bool, typer.Option("--json", help="print one JSON value instead of text")]
Folder = Annotated[str, typer.Argument(help="folder that `graft train` wrote", show_default=False)]


def guarded(command: F) -> F:
    """A command whose errors become a message and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            fail("stopped before there was anything to save", "Interrupted", FAILED, kwargs)
        except GraftworkError as error:
            fail(str(error), type(error).__name__, _code(error), kwargs, error)
        except Exception as error:
            fail(*_unforeseen(error), FAILED, kwargs, error)

    return wrapper  # type: ignore[return-value]


def _code(error: GraftworkError) -> int:
    from ..errors import TargetError
    from ..train.options import OptionError
    from ..train.recipe import RecipeError

    return WRONG if isinstance(error, (RecipeError, OptionError, TargetError)) else FAILED


def _unforeseen(error: Exception) -> tuple[str, str]:
    name, text = type(error).__name__, str(error).strip() or "no text"
    if isinstance(error, ModuleNotFoundError) and not text.startswith("No module named 'graftwork"):
        return f"{text}; install what is missing with `pip install 'graftwork[train]'`", name
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return (
            f"the memory does not suffice: {text.splitlines()[0]}. Halve --batch-size and double "
            "--gradient-accumulation, or use --gradient-checkpointing",
            name,
        )
    return f"unexpected {name}: {text}\nGRAFT_DEBUG=1 shows where; please report it", name


def fail(
    text: str, kind: str, code: int, options: dict[str, Any], error: Exception | None = None
) -> NoReturn:
    """Print an error and leave.

    Args:
        text: what is wrong and what to do.
        kind: the error's type, for machines.
        code: the exit code.
        options: the command's options; with ``json`` the error is also printed to stdout.
        error: shown with its traceback where GRAFT_DEBUG is set.
    """
    if error is not None and os.environ.get("GRAFT_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if options.get("json"):
        show_json({"error": {"type": kind, "message": text}})
    style, end = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{style}error{end}  {text}", file=sys.stderr)
    raise typer.Exit(code)


def show_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def message(text: str) -> None:
    """Print a remark on stderr."""
    print(f"note   {text}", file=sys.stderr)
