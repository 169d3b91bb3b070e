"""The recipe: everything that ``graft train`` can be told, by flags or by the keys of one YAML
file. What a user wrote is checked here, once; the rest of the package trusts it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import GraftworkError, did_you_mean
from ..files.bounded import shown
from . import options

MAX_CONFIG = 2**16  # bytes; a recipe is a few lines


class RecipeError(GraftworkError, ValueError):
    """Something in the recipe, the data or the folders that the user can put right."""


def _option(group: str, text: str, default: Any = None, **limits: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)


WHAT, DATA, LEARNING, MACHINE = "What to train", "Data", "Learning", "Machine and files"


class Recipe(BaseModel):
    """One training. Each field is a flag and a YAML key; None means: chosen from the data."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: str = _option(WHAT, "base model: a folder or a hub id", ...)
    data: str = _option(
        WHAT, "training data: csv, tsv, json, jsonl, parquet, txt, a folder or a hub id", ...
    )
    task: str = _option(WHAT, "classification, instruction, language; auto: by the columns", "auto")
    method: str = _option(WHAT, "how to adapt; `graft methods` lists them", "LORA")
    output: str | None = _option(WHAT, "folder to write; by default named after data and method")

    test_data: str | None = _option(DATA, "held-out data; by default a share of the data")
    test_share: float = _option(DATA, "share held out where there is no test data", 0.1, gt=0, lt=1)
    samples: int | None = _option(DATA, "use so many training samples, drawn by the seed", ge=1)
    subset: str | None = _option(DATA, "configuration of a hub data set, such as `sst2` of glue")
    text_column: str | None = _option(DATA, "column with the text")
    text_pair_column: str | None = _option(DATA, "column with a second text beside it")
    label_column: str | None = _option(DATA, "column with the label")
    prompt_column: str | None = _option(DATA, "column with the prompt")
    completion_column: str | None = _option(DATA, "column with the answer to learn")
    template: str | None = _option(DATA, "text around a prompt; holds {prompt}; \\n is a new line")
    max_length: int | None = _option(DATA, "longest sample in tokens", ge=4)
    skip_bad_rows: bool = _option(DATA, "leave out rows without a text or a label", False)

    epochs: float | None = _option(LEARNING, "passes over the data; 1 by default", gt=0)
    steps: int | None = _option(LEARNING, "optimizer steps, instead of epochs", ge=1)
    batch_size: int = _option(LEARNING, "samples in one forward pass", 32, ge=1)
    gradient_accumulation: int = _option(LEARNING, "forward passes in one step", 1, ge=1)
    learning_rate: float | None = _option(LEARNING, "peak rate; by default by method", gt=0)
    head_learning_rate: float | None = _option(
        LEARNING, "of a new head; by default by method", gt=0
    )
    schedule: Literal["linear", "cosine", "constant"] = _option(
        LEARNING, "linear, cosine or constant", "linear"
    )
    warmup: float = _option(LEARNING, "share of the steps with a rising rate", 0.06, ge=0, lt=1)
    weight_decay: float = _option(LEARNING, "AdamW's weight decay", 0.0, ge=0)
    max_grad_norm: float = _option(LEARNING, "gradients are clipped to this norm", 1.0, gt=0)
    base_dropout: float | None = _option(
        LEARNING, "dropout inside the base model; by default by method", ge=0, lt=1
    )
    seed: int = _option(LEARNING, "decides split, order, start and dropout", 0, ge=0)

    precision: Literal["auto", "fp32", "bf16", "fp16"] = _option(
        MACHINE, "auto, fp32, bf16 or fp16", "auto"
    )
    attention: str = _option(
        MACHINE, "auto, eager, sdpa or another of transformers' kernels", "auto"
    )
    fused_loss: Literal["auto", "off"] = _option(
        MACHINE, "auto: the loss without whole logits where the model allows it; or off", "auto"
    )
    packing: Literal["auto", "on", "off"] = _option(
        MACHINE,
        "batches without padding: auto (where that is the same and spares 5 %), on, off",
        "auto",
    )
    cache_prefix: bool = _option(
        MACHINE, "run the frozen blocks below the lowest adapter once, for all epochs", False
    )
    cache_prefix_gb: float = _option(
        MACHINE, "GB of their states held in memory; more goes into a file", 2.0, gt=0
    )
    gradient_checkpointing: bool = _option(MACHINE, "less memory for a third more time", False)
    checkpoint_steps: int = _option(MACHINE, "steps between two checkpoints", 500, ge=1)
    revision: str | None = _option(MACHINE, "the base model's revision on the hub")
    overwrite: bool = _option(MACHINE, "replace an earlier result in the output folder", False)

    method_options: dict[str, Any] = Field(default_factory=dict)

    @property
    def explicit(self) -> dict[str, Any]:
        """What the user set, flat, as in a YAML file."""
        own = {k: v for k, v in self.model_dump(exclude_unset=True).items() if v is not None}
        options_of_method = own.pop("method_options", {})
        return {**own, **options_of_method}


FIELDS = {k: f for k, f in Recipe.model_fields.items() if k != "method_options"}


def group_of(name: str) -> str:
    """The heading under which a field stands in the help."""
    extra = FIELDS[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


def flag(key: str) -> str:
    """A key as it is typed on the command line."""
    return f"--{key.replace('_', '-')}"


def read_yaml(path: str) -> dict[str, Any]:
    """The keys and values of a recipe file.

    Raises:
        RecipeError: there is no such file, or it is no list of keys with values.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(
            f"there is no recipe file {path}{did_you_mean(file.name, _siblings(file))}"
        )
    if file.stat().st_size > MAX_CONFIG:
        raise RecipeError(f"{path} is far too large for a recipe; give the data with --data")
    return settings(file.read_bytes(), path)


def settings(text: bytes, where: str) -> dict[str, Any]:
    """The keys and values in the text of a recipe file.

    Raises:
        RecipeError: it is no list of keys with values, or refers to parts of itself: those can
            stand for more than any memory holds.
    """
    from ..files.plain import YAML_ERRORS, plain_yaml

    try:
        found = plain_yaml(text.decode("utf-8-sig"))
    except YAML_ERRORS as error:
        raise RecipeError(f"{where} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{where} must hold lines such as `batch_size: 32`, not {shown(found)}")
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def _siblings(file: Path) -> list[str]:
    return [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []


def build(
    flags: Mapping[str, Any], file: Mapping[str, Any] | None = None, where: str = "the recipe"
) -> tuple[Recipe, list[str]]:
    """A recipe from flags and a file's keys; flags win.

    Args:
        flags: values by key, as typed or as Python values.
        file: values by key, from a YAML file.
        where: the file's name, for messages.

    Returns:
        The recipe, and remarks on names that were understood though they are spelt otherwise here.

    Raises:
        RecipeError: a key is unknown or a value cannot be used.
    """
    raw = [(file or {}, lambda key: f"{where}: {key}"), (flags, flag)]
    try:
        return _assembled(raw)
    except options.OptionError as error:
        raise RecipeError(str(error)) from error


def _assembled(
    raw: list[tuple[Mapping[str, Any], Callable[[str], str]]],
) -> tuple[Recipe, list[str]]:
    everything = {options.rename(k, FIELDS): v for settings, _ in raw for k, v in settings.items()}
    method = str(everything.get("method", FIELDS["method"].default)).upper().replace("-", "_")
    known = {*FIELDS, *options.names_of(method)}
    given: dict[str, Any] = {"method": method}
    spelling: dict[str, str] = {}
    remarks: list[str] = []
    for settings, spell in raw:
        for key, value in settings.items():
            name = options.rename(key, known)
            if name not in known:
                raise options.unknown(key, spell(key), method, known)
            if name != key:
                remarks.append(f"{spell(key)} is called {name} here")
            if name != "method":
                given[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
            spelling[name] = spell(key)
    own = {k: v for k, v in given.items() if k in FIELDS}
    extra = {k: v for k, v in given.items() if k not in FIELDS}
    own["method_options"] = options.parse(method, extra, spelling)
    return _validated(own, spelling), remarks


def _validated(own: dict[str, Any], spelling: Mapping[str, str]) -> Recipe:
    try:
        recipe = Recipe.model_validate(own)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = str(problem["loc"][0])
            if problem["type"] == "missing":
                lines.append(f"{flag(name)} is missing: {FIELDS[name].description}")
            else:
                reason = problem["msg"].removeprefix("Input should be ")
                lines.append(
                    f"{spelling.get(name, name)} should be {reason}, not {shown(own[name])}"
                )
        raise RecipeError("\n".join(lines)) from error
    if recipe.steps is not None and recipe.epochs is not None:
        raise RecipeError("--steps and --epochs exclude each other; give one of them")
    if recipe.template is not None and "{prompt}" not in recipe.template:
        raise RecipeError(f"--template must contain {{prompt}}; {shown(recipe.template)} does not")
    return recipe
