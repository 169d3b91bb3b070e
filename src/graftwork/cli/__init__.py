"""The command ``graft``: one file for each of its commands. Nothing heavy is imported before a
command needs it.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with 0, 1 (it failed) or 2 (it was asked for wrongly)."""
    import os
    import sys

    from .app import build

    completing = "_GRAFT_COMPLETE" in os.environ  # a shell asks for the options
    build(None if completing else sys.argv[1:])(prog_name="graft")
