"""``python -m graftwork.cli`` is the command ``graft``."""

from . import main

main()
