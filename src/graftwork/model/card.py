"""The ``README.md`` of an adapter's folder, which the hub shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..config import PeftConfig
from ..errors import warn
from ..files.atomic import Saving

CARD = "README.md"


def model_card(directory: str | os.PathLike[str], config: PeftConfig) -> None:
    """Write the folder's README.md, or complete its head for the hub."""
    with Saving(Path(directory)).begun() as saving:
        put_card(saving, config)


def put_card(saving: Saving, config: PeftConfig) -> None:
    """The README.md among what is saved; one that is there keeps what it says."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    text = (
        f"---\nlibrary_name: peft\n---\n\n# {config.method} adapter\n\nAn adapter for "
        f"`{config.base_model_name_or_path or 'a model'}`, "
        "in the file format of PEFT.\n\n```python\nfrom graftwork import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "this folder")\n```\n'
    )
    path = saving.folder / CARD
    try:
        card: Any = ModelCard.load(path) if path.is_file() else ModelCard(text)
    except (YAMLError, ValueError, TypeError) as error:
        warn(f"the head of {path} cannot be read, and the file is left as it is: {error}")
        return
    card.data.library_name = "peft"
    card.data.tags = sorted({*(card.data.tags or []), "graftwork", config.method.lower()})
    if config.base_model_name_or_path and not os.path.isabs(config.base_model_name_or_path):
        card.data.base_model = config.base_model_name_or_path
    saving.put(CARD, str(card).encode())
