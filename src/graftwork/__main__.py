"""``python -m graftwork`` is the command ``graft``."""

from .cli import main

main()
