"""Fixtures: tiny models and small data, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the data sets library out of the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import toys

    return toys.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import toys

    return toys.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import toys

    folder = tmp_path_factory.mktemp("reviews")
    toys.write_table(folder / "train.csv", toys.reviews(120), ("text", "label"))
    toys.write_table(folder / "test.csv", toys.reviews(40, seed=1), ("text", "label"))
    return folder


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import toys

    folder = tmp_path_factory.mktemp("answers")
    return toys.write_table(folder / "answers.jsonl", toys.answers(80), ("prompt", "completion"))
