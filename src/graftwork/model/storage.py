"""Saving and loading the adapters of a ``PeftModel``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import PeftConfig
from ..errors import FileError, StateError, did_you_mean
from ..fast.shards import gather
from ..files import identity, starts
from ..files.folder import write
from ..files.places import places
from ..updates.plain import as_plain_lora
from . import resuming, vocabulary
from .functional import get_peft_model_state_dict, within

if TYPE_CHECKING:
    from .peft_model import PeftModel


def save(
    model: PeftModel,
    directory: str | os.PathLike[str],
    selected: list[str] | None,
    embeddings: str | bool,
    plain: bool,
    state_dict: Mapping[str, Tensor] | None,
    compat: str | None = None,
    writes: bool = True,
) -> None:
    """Write adapters into a folder; see ``PeftModel.save_pretrained``. ``writes``: False only
    gathers what other processes have parts of.
    """
    folder = Path(directory)
    if folder.is_file():
        raise FileError(f"{folder} is a file; give a folder to save_pretrained")
    names = list(model.peft_config) if selected is None else list(selected)
    if unknown := [n for n in names if n not in model.peft_config]:
        raise StateError(
            f"selected_adapters names {unknown}; this model has {sorted(model.peft_config)}"
            + did_you_mean(unknown[0], model.peft_config)
        )
    if compat == "peft":  # before anything is written
        for name in names:
            model.peft_config[name].for_peft(model.get_base_model(), {})
    base, configs = model.get_base_model(), model.peft_config
    targets = places(folder, {name: configs[name].folders(base, name) for name in names})
    note = {"identity": identity.identity(base, vocabulary.grown(base, names))}
    given = None if state_dict is None else within(model, state_dict)
    for name in names:
        config = model.peft_config[name]
        tensors = get_peft_model_state_dict(
            model, state_dict, name, save_embedding_layers=embeddings
        )
        if plain:
            config, tensors = as_plain_lora(model.get_base_model(), config, name, tensors)
        if compat == "peft":
            config, tensors = config.for_peft(model.get_base_model(), tensors)
        config = copy(config)
        config.inference_mode = True
        config.base_model_name_or_path = (
            config.base_model_name_or_path or model.get_base_model().__dict__.get("name_or_path")
        )
        target = targets[name]
        start = {} if plain else starts.state(model.get_base_model(), name)
        beside = {"training": resuming.training_state(model, name, given), "start": start}
        folders = {
            inner: (own, {key: gather(key, value) for key, value in values.items()})
            for inner, (own, values) in config.folders(model.get_base_model(), name).items()
        }
        if not writes:
            continue
        write(target, config, tensors, note, beside)
        for inner, (own, values) in folders.items():
            write(target / inner, own, values, note, {})
    if writes:
        model_card(folder, model.active_peft_config)


def model_card(directory: str | os.PathLike[str], config: PeftConfig) -> None:
    """Write the folder's README.md, or complete its head for the hub."""
    from huggingface_hub import ModelCard

    path = Path(directory) / "README.md"
    text = (
        f"---\nlibrary_name: peft\n---\n\n# {config.method} adapter\n\nAn adapter for "
        f"`{config.base_model_name_or_path or 'a model'}`, "
        "in the file format of PEFT.\n\n```python\nfrom graftwork import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "this folder")\n```\n'
    )
    card: Any = ModelCard.load(path) if path.is_file() else ModelCard(text)
    card.data.library_name = "peft"
    card.data.tags = sorted({*(card.data.tags or []), "graftwork", config.method.lower()})
    if config.base_model_name_or_path and not os.path.isabs(config.base_model_name_or_path):
        card.data.base_model = config.base_model_name_or_path
    card.save(path)


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
