"""Recipes: flags and YAML keys are one, and what cannot be used is said with its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftwork.table import METHODS
from graftwork.train import options
from graftwork.train.recipe import FIELDS, RecipeError, build, group_of, read_yaml

BASE = {"model": "m", "data": "d.csv"}


def test_text_from_flags_and_values_from_yaml_mean_the_same() -> None:
    typed, _ = build({**BASE, "learning_rate": "1e-3", "r": "16", "use_dora": True, "epochs": "2"})
    read, _ = build({}, {**BASE, "learning_rate": 0.001, "r": 16, "use_dora": True, "epochs": 2})
    assert typed == read
    assert read.method_options == {"r": 16, "use_dora": True}


def test_flags_win_over_the_file() -> None:
    recipe, _ = build({"batch_size": "4"}, {**BASE, "batch_size": 64, "seed": 3})
    assert (recipe.batch_size, recipe.seed) == (4, 3)


def test_a_recipe_survives_its_own_dictionary() -> None:
    recipe, _ = build({**BASE, "method": "adalora", "target_r": 4, "samples": 10})
    assert build(recipe.explicit)[0] == recipe


WRONG = {
    "a flag's typing error": ({"learning_rat": 1}, r"--learning-rat is no option.*learning-rate"),
    "a method's typing error": ({"lora_alpa": 1}, r"--lora-alpa is no option.*lora-alpha"),
    "another method's option": ({"target_r": 4}, r"--target-r is an option of ADALORA.*is LORA"),
    "an unknown method": ({"method": "lorra"}, r"--method: there is no method 'LORRA'.*'LORA'"),
    "a rank of 0": ({"r": 0}, r"r must be at least 1, not 0; try r=8"),
    "half a rank": ({"r": "2.5"}, r"--r should be a valid integer.*not 2\.5"),
    "a rank in words": ({"r": "eight"}, r"--r should be a valid integer.*not 'eight'"),
    "a batch of 0": (
        {"batch_size": 0},
        r"--batch-size should be greater than or equal to 1, not 0",
    ),
    "an unknown precision": ({"precision": "fp8"}, r"--precision should be 'auto', 'fp32', 'bf16'"),
    "a rate of NaN": ({"learning_rate": "nan"}, r"--learning-rate should be a finite number"),
    "steps and epochs": ({"steps": 1, "epochs": 1}, r"exclude each other"),
    "a template without a hole": ({"template": "Q:"}, r"must contain \{prompt\}"),
    "a filled-in field": ({"peft_version": "1"}, r"--peft-version is no option"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_remedy(name: str) -> None:
    settings, text = WRONG[name]
    with pytest.raises(RecipeError, match=f"(?s){text}"):
        build({**BASE, **settings})


def test_what_is_missing_is_listed() -> None:
    with pytest.raises(RecipeError, match=r"(?s)--model is missing: .*--data is missing: "):
        build({})


def test_the_file_is_named_in_errors() -> None:
    with pytest.raises(RecipeError, match=r"mine\.yaml: epoch is no option.*epochs"):
        build({}, {**BASE, "epoch": 1}, "mine.yaml")


def test_names_of_other_trainers_are_understood() -> None:
    recipe, remarks = build({"model_name_or_path": "m", "dataset": "d.csv", "lora_rank": 4})
    assert (recipe.model, recipe.data, recipe.method_options) == ("m", "d.csv", {"r": 4})
    assert "--lora-rank is called r here" in remarks


def test_every_alias_leads_somewhere() -> None:
    own = {*FIELDS, *(name for method in METHODS for name in options.names_of(method))}
    assert set(options.ALIASES.values()) <= own
    assert not set(options.ALIASES) & set(FIELDS)


def test_no_option_of_a_method_hides_a_field_of_the_recipe() -> None:
    for method in METHODS:
        assert not set(options.names_of(method)) & set(FIELDS), method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_config_without_any_option(method: str) -> None:
    needs: dict[str, Any] = {"TRAINABLE_TOKENS": {"token_indices": [1]}}.get(method, {})
    needs |= options.filled(method, {}, "a model", ())
    config = options.make(method, needs, steps=100, task_type="CAUSAL_LM")
    assert config.method == method


def test_lists_are_written_with_commas_and_patterns_as_they_are() -> None:
    recipe, _ = build({**BASE, "target_modules": "q_proj, v_proj"})
    assert recipe.method_options == {"target_modules": ["q_proj", "v_proj"]}
    recipe, _ = build({**BASE, "target_modules": "q_proj", "init_lora_weights": "pissa"})
    assert recipe.method_options == {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    recipe, _ = build({**BASE, "target_modules": r".*\.(q|v)_proj{1,2}"})
    assert recipe.method_options == {"target_modules": r".*\.(q|v)_proj{1,2}"}


def test_a_schedule_is_filled_in_from_the_steps() -> None:
    config = options.make("ADALORA", {"tfinal": 3}, steps=100)
    assert (config.total_step, config.tinit, config.tfinal) == (100, 10, 3)
    assert options.make("ADALORA", {"total_step": 50}, steps=100).total_step == 50


def test_yaml_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata: d.csv\nlearning-rate: 1e-3\n")
    assert build({}, read_yaml(str(file)))[0].learning_rate == 1e-3
    with pytest.raises(RecipeError, match=r"no recipe file .*recipes\.yaml; did you mean 'recipe"):
        read_yaml(str(tmp_path / "recipes.yaml"))
    for text, words in (("- a\n- b", "must hold lines"), ("a: [", "is no YAML")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=words):
            read_yaml(str(file))


def test_every_field_stands_under_a_heading() -> None:
    assert {group_of(name) for name in FIELDS} == {
        "What to train", "Data", "Learning", "Machine and files",
    }  # fmt: skip
