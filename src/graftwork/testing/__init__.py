"""A kit for methods: every law on every kind of layer, and what a method can do.

``check_method(MyConfig(...))`` runs them all and prints a table; see ``docs/custom-methods.md``.
"""

from .check import Report as Report
from .check import check_method as check_method
