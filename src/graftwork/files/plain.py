"""YAML that is data: no types of Python, and nothing that refers to another part of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import FileError
from .bounded import content

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


MAX_CARD = 2**20  # bytes of a README.md
MAX_HEAD = 2**15  # characters of what stands in it between two lines of dashes
HEAD = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r?\n|$)", re.DOTALL)


def card_text(path: Path) -> str:
    """The text of a README.md whose head is data, and no more than a hub's page needs.

    Raises:
        FileError: it is too large, or its head is no YAML of names and values.
    """
    return checked_card(content(path, MAX_CARD), path)


def checked_card(data: bytes, where: object) -> str:
    """As of ``card_text``, from the content of the file."""
    text = data.decode("utf-8", "replace")
    if (found := HEAD.match(text)) is None:
        return text
    if len(found[1]) > MAX_HEAD:
        raise FileError(f"the head of {where} has {len(found[1])} characters")
    try:
        head = plain_yaml(found[1])
    except YAML_ERRORS as error:
        raise FileError(f"the head of {where} is no YAML: {error}") from error
    tags = head.get("tags") if isinstance(head, dict) else None
    named = isinstance(head, (dict, type(None))) and all(isinstance(k, str) for k in head or ())
    if not named or not (tags is None or _texts(tags)):
        raise FileError(f"the head of {where} holds no names and values such as a hub's page has")
    return text


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
