"""The command ``graft``: one file for each of its commands. Nothing heavy is imported before a
command needs it.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with 0, 1 (it failed) or 2 (it was asked for wrongly)."""
    from .app import build

    build()(prog_name="graft")
