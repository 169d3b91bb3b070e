"""Adapters on the hub: the ``README.md`` that it shows, and uploading."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PeftConfig
from ..errors import FileError, warn
from ..files.atomic import Saving

if TYPE_CHECKING:
    from .peft_model import PeftModel

CARD = "README.md"


def model_card(directory: str | os.PathLike[str], config: PeftConfig) -> None:
    """Write the folder's README.md, or complete its head for the hub."""
    with Saving(Path(directory)).begun() as saving:
        put_card(saving, config)


def put_card(saving: Saving, config: PeftConfig) -> None:
    """The README.md among what is saved; one that is there keeps what it says."""
    from huggingface_hub import ModelCard

    from ..files.plain import card_text

    text = (
        f"---\nlibrary_name: peft\n---\n\n# {config.method} adapter\n\nAn adapter for "
        f"`{config.base_model_name_or_path or 'a model'}`, "
        "in the file format of PEFT.\n\n```python\nfrom graftwork import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "this folder")\n```\n'
    )
    path = saving.folder / CARD
    try:
        card: Any = ModelCard(card_text(path) if path.exists() else text)
    except (FileError, ValueError, TypeError) as error:
        warn(f"the head of {path} cannot be read, and the file is left as it is: {error}")
        return
    card.data.library_name = "peft"
    card.data.tags = sorted({*(card.data.tags or []), "graftwork", config.method.lower()})
    if config.base_model_name_or_path and not os.path.isabs(config.base_model_name_or_path):
        card.data.base_model = config.base_model_name_or_path
    saving.put(CARD, str(card).encode())


def push(model: PeftModel, repo_id: str, **kwargs: Any) -> Any:
    """Save into a temporary folder and upload that."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    private, message = kwargs.pop("private", None), kwargs.pop("commit_message", "Upload adapter")
    revision, create_pr = kwargs.pop("revision", None), kwargs.pop("create_pr", False)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **kwargs)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
