"""The options of the methods: the fields of their config classes, and the command line's defaults
for them. A method that stands in the table of methods needs nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from ..config import PeftConfig, TargetConfig, TaskType
from ..errors import GraftworkError, did_you_mean
from ..files.bounded import shown
from ..table import METHODS, method
from .defaults import defaults

FILLED_IN = {f.name for f in fields(PeftConfig)} | {"runtime_config"}  # not the user's to give

ALIASES = {  # what other trainers call it -> what it is called here
    "model_name_or_path": "model",
    "base_model": "model",
    "base_model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "train_data": "data",
    "eval_data": "test_data",
    "eval_dataset": "test_data",
    "val_data": "test_data",
    "validation_data": "test_data",
    "val_size": "test_share",
    "val_set_size": "test_share",
    "split_dataset_ratio": "test_share",
    "max_samples": "samples",
    "max_train_samples": "samples",
    "dataset_config_name": "subset",
    "peft_type": "method",
    "peft_method": "method",
    "tuner_type": "method",
    "finetuning_type": "method",
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup",
    "save_steps": "checkpoint_steps",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
}


class OptionError(GraftworkError, ValueError):
    """A key that nothing here has, or a value that its field cannot hold."""


TASKS = {"MULTITASK_PROMPT_TUNING": "num_tasks", "POLY": "n_tasks"}  # how many tasks share it


def names_of(method_name: str) -> list[str]:
    """The options that a user can give for a method."""
    config = config_class(method_name)
    return [f.name for f in fields(config) if f.init and f.name not in FILLED_IN]


def config_class(name: str) -> type[PeftConfig]:
    """The config class of a method.

    Raises:
        OptionError: there is no such method.
    """
    if name not in METHODS:
        near = did_you_mean(name, METHODS) or f"; there are {', '.join(sorted(METHODS))}"
        raise OptionError(f"--method: there is no method {name!r}{near}")
    return method(name).config


def rename(key: str, known: Collection[str]) -> str:
    """The key under its name here; a method's own name goes before an alias."""
    return key if key in known else ALIASES.get(key, key)


def parse(name: str, given: Mapping[str, Any], spelling: Mapping[str, str]) -> dict[str, Any]:
    """The options of a method, in the types of its config's fields.

    Args:
        name: the method.
        given: text as typed, or values from YAML, by field; all of them are fields.
        spelling: how the user wrote each key, for messages.

    Raises:
        OptionError: a value does not fit, with the reason.
    """
    config = config_class(name)
    hints = get_type_hints(config)
    values = {
        key: _typed(spelling[key], _read(value, hints[key]), hints[key])
        for key, value in given.items()
    }
    # the config's own checks, before any data is read; no method refuses this task
    known = filled(name, values, "a model", ("a label",))
    make(name, {**values, **known}, steps=10**6, task_type=TaskType.CAUSAL_LM)
    return values


def filled(
    name: str, values: Mapping[str, Any], tokenizer: str, labels: Sequence[str]
) -> dict[str, Any]:
    """What the pipeline knows where a prompt is to start as a text or as labels.

    Args:
        name: the method.
        values: the user's options.
        tokenizer: the base model's.
        labels: of classification; empty otherwise.
    """
    start = {**defaults(name).options, **values}.get("prompt_tuning_init")
    known: dict[str, Any] = {}
    if start in ("TEXT", "LABELS"):
        known["tokenizer_name_or_path"] = tokenizer
    if start == "TEXT":
        asked = f"Classify the text: {' or '.join(labels)}." if labels else "Write what follows."
        known["prompt_tuning_init_text"] = asked
    if start == "LABELS" and labels:
        known["prompt_tuning_init_labels"] = list(labels)
    return {key: value for key, value in known.items() if key not in values}


def make(name: str, values: Mapping[str, Any], steps: int, **fixed: Any) -> PeftConfig:
    """A method's config from the user's options, the defaults, and the number of steps.

    Args:
        name: the method.
        values: the user's options.
        steps: optimizer steps of the whole training, for methods that follow a schedule.
        **fixed: fields that the pipeline decides, such as ``task_type``.

    Raises:
        OptionError: the config refuses a value.
    """
    config = config_class(name)
    own = {f.name for f in fields(config)}
    chosen = {**defaults(name).options, **values}
    if "total_step" in own and "total_step" not in values:
        chosen["total_step"] = steps
        # learn a tenth at full rank, and a fifth at the final rank
        chosen = {"tinit": steps // 10, "tfinal": steps // 5, **chosen}
    try:
        return config(**{k: v for k, v in chosen.items() if k in own}, **fixed)
    except (TypeError, ValueError) as error:
        raise refused(name, error) from error


def refused(name: str, error: Exception) -> OptionError:
    """The error for options of a method that its config or the base model refuses."""
    return OptionError(f"the method {name} cannot be used like this: {error}")


def unknown(key: str, spelled: str, name: str, known: Collection[str]) -> OptionError:
    """The error for a key that neither the recipe nor the method has."""
    owners = [m for m in METHODS if m != name and key in names_of(m)]
    if owners:
        return OptionError(
            f"{spelled} is an option of {', '.join(owners)}; the method here is {name}. Choose "
            "that method with --method, or leave the option out"
        )
    near = did_you_mean(key, [*known, *ALIASES]).replace("_", "-")
    return OptionError(
        f"{spelled} is no option{near or ''}. `graft train --help` lists the options, "
        f"`graft methods {name}` those of {name}"
    )


def _read(value: Any, hint: Any) -> Any:
    """Text from the command line as YAML would read it; lists may be written with commas."""
    if not isinstance(value, str):
        return value
    from ..files.plain import YAML_ERRORS, plain_yaml

    if hint is str or (set(get_args(hint)) == {str, type(None)} and value.lower() != "null"):
        return value
    pattern = re.search(r"[\\^$*+?{}()|\[\]]", value)
    try:
        if "," in value and not pattern:
            return [plain_yaml(part) for part in value.split(",") if part.strip()]
        found = plain_yaml(value)
    except YAML_ERRORS:  # a regex such as `.*[qv]_proj: x` is simply text
        return value
    # one name is a list of one; the fields of any type would take it for a regex
    one_name = hint is Any and isinstance(found, str) and not pattern and found != "all-linear"
    return [found] if one_name else found


def _typed(spelled: str, value: Any, hint: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise OptionError(f"{spelled} should be {reason}, not {shown(value)}") from error


def is_targeted(name: str) -> bool:
    """Whether a method sits at layers that can be named."""
    return issubclass(config_class(name), TargetConfig)
