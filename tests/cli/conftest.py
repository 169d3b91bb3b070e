"""Fixtures of the command line's tests."""

from __future__ import annotations

import os

import pytest

from graftwork.fast import heap

os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the data sets library out of the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How often the allocator was asked to keep what is freed; that of the tests is left alone."""
    asked: list[bool] = []
    monkeypatch.setattr(heap, "keep", lambda: asked.append(True))
    return asked
