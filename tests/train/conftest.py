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
    from train import tiny

    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import tiny

    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import tiny

    folder = tmp_path_factory.mktemp("reviews")
    tiny.write_table(folder / "train.csv", tiny.reviews(120), ("text", "label"))
    tiny.write_table(folder / "test.csv", tiny.reviews(40, seed=1), ("text", "label"))
    return folder


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train import tiny

    folder = tmp_path_factory.mktemp("answers")
    return tiny.write_table(folder / "answers.jsonl", tiny.answers(80), ("prompt", "completion"))
