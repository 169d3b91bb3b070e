"""Saving and loading the adapters of a ``PeftModel``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..config import PeftConfig
from ..errors import FileError, StateError, did_you_mean
from ..fast.shards import gather
from ..files import identity, starts
from ..files.atomic import Saving
from ..files.folder import put
from ..files.places import places
from ..updates.plain import as_plain_lora
from . import resuming, vocabulary
from .card import put_card
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
    if os.path.isfile(folder):
        raise FileError(f"{folder} is a file; give a folder to save_pretrained")
    names = list(dict.fromkeys(model.peft_config if selected is None else selected))
    if unknown := [n for n in names if n not in model.peft_config]:
        raise StateError(
            f"selected_adapters names {unknown}; this model has {sorted(model.peft_config)}"
            + did_you_mean(unknown[0], model.peft_config)
        )
    if compat == "peft":  # before anything is written
        for name in names:
            model.peft_config[name].for_peft(model.get_base_model(), {})
    base, configs = model.get_base_model(), model.peft_config
    places(folder, {name: configs[name].folders(base, name) for name in names})
    note = {"identity": identity.identity(base, vocabulary.grown(base, names))}
    given = None if state_dict is None else within(model, state_dict)
    with Saving(folder).begun() if writes else nullcontext() as saving:
        for name in names:
            config, tensors = _content(model, name, embeddings, plain, state_dict, compat)
            start = {} if plain else starts.state(base, name)
            beside = {"training": resuming.training_state(model, name, given), "start": start}
            folders = {
                inner: (own, {key: gather(key, value) for key, value in values.items()})
                for inner, (own, values) in config.folders(base, name).items()
            }
            if saving is None:
                continue
            where = "" if name == "default" else name
            put(saving, where, config, tensors, note, beside)
            for inner, (own, values) in folders.items():
                put(saving, os.path.join(where, inner), own, values, note, {})
        if saving is not None:
            put_card(saving, model.active_peft_config)


def _content(
    model: PeftModel,
    name: str,
    embeddings: str | bool,
    plain: bool,
    state_dict: Mapping[str, Tensor] | None,
    compat: str | None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter's file."""
    base, config = model.get_base_model(), model.peft_config[name]
    tensors = get_peft_model_state_dict(model, state_dict, name, save_embedding_layers=embeddings)
    if plain:
        config, tensors = as_plain_lora(base, config, name, tensors)
    if compat == "peft":
        config, tensors = config.for_peft(base, tensors)
    config = copy(config)
    config.inference_mode = True
    of = config.base_model_name_or_path or base.__dict__.get("name_or_path")
    # of a model without a name PEFT writes an empty one for prompts, and none for others
    config.base_model_name_or_path = of if of or config.is_prompt_learning else None
    return config, tensors
