"""YAML that is data: no types of Python, and nothing that refers to another part of it."""

from __future__ import annotations

from typing import Any

import yaml

YAML_ERRORS = (yaml.YAMLError, ValueError, ArithmeticError, RecursionError, LookupError)


class Plain(yaml.SafeLoader):
    """PyYAML's safe reader without references, by which a few lines stand for any amount."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to a part of itself (*name); write that out")
        return super().compose_node(parent, index)


def plain_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        YAML_ERRORS: it says nothing.
    """
    return yaml.load(text, Plain)
