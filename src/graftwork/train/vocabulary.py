"""The embeddings of a base model's vocabulary, without the rest of the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..files.bounded import weight_map
from ..files.hub import Source
from ..files.mapped import layout, opened
from . import base
from .recipe import RecipeError

WEIGHTS = "model.safetensors"


def load(source: str, revision: str | None = None) -> nn.Embedding:
    """The input embedding of a base model; of its files only this table is read.

    Args:
        source: a folder or a hub id.
        revision: the revision on the hub.

    Raises:
        RecipeError: it cannot be had.
        FileError: a file is damaged, or the hub cannot be reached.
    """
    import transformers
    from accelerate import init_empty_weights

    source = base.resolve(source)
    config = base.load_config(source, revision)
    with init_empty_weights():
        model: Any = transformers.AutoModel.from_config(config)
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise RecipeError(f"--model: a {config.model_type} has no embeddings of a vocabulary")
    name = next(name for name, module in model.named_modules() if module is table)
    files = Source(source, revision=revision)
    for key, where in _candidates(f"{name}.weight", _files(files)):
        if (path := files.find(where)) is None:  # a part of the model that was not copied along
            continue
        with opened(path) as file:
            if tuple(file.get_slice(key).get_shape()) == tuple(table.weight.shape):
                table.weight = nn.Parameter(file.get_tensor(key), requires_grad=False)
                return table
    raise RecipeError(f"--model: {source} has no safetensors file with the weight {name}.weight")


def _files(source: Source) -> dict[str, str]:
    """Name of a weight -> the file that holds it."""
    if (path := source.find(WEIGHTS)) is not None:
        return dict.fromkeys(layout(path).entries, WEIGHTS)
    if (index := source.find(f"{WEIGHTS}.index.json")) is not None:
        return weight_map(index)
    return {}


def _candidates(name: str, files: dict[str, str]) -> list[tuple[str, str]]:
    """The weights that may be called ``name`` by their file, the likeliest first: models are saved
    with a head, and within others, so their fronts differ.
    """
    words = name.split(".")
    tails = [".".join(words[i:]) for i in range(len(words) - 1)]
    return [item for tail in tails for item in files.items() if f".{item[0]}".endswith(f".{tail}")]
