"""``graftwork.as_peft()``: from then on ``import peft`` means this library.

``python -m graftwork.as_peft program.py arguments`` runs a program so.
"""

from __future__ import annotations

import runpy
import sys
from types import ModuleType


def as_peft() -> ModuleType:
    """Make ``import peft``, its submodules and its version mean this library in this process.

    Raises:
        GraftworkError: the real peft has been imported already.
    """
    from .interop.alias import become_peft

    return become_peft()


def main(arguments: list[str]) -> int:
    """Run ``program.py arguments`` with this library as peft; the exit code 2 means wrong usage."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m graftwork.as_peft program.py [arguments]\n"
              "Runs a program that imports peft with graftwork in its "
              "place.", file=sys.stderr)  # fmt: skip
        return 0 if arguments else 2
    as_peft()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


class _Callable(ModuleType):
    """The module is called like the function: both are named ``graftwork.as_peft``."""

    def __call__(self) -> ModuleType:
        return as_peft()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
sys.modules[__name__].__class__ = _Callable
