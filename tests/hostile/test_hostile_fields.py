"""Every field of every config, set to every value that JSON can say and nobody means."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from graftwork import METHODS, PeftConfig, PeftModel
from graftwork.errors import GraftworkError
from graftwork.files.folder import config_in
from graftwork.table import method
from graftwork.testing.entry import IDS
from specs import ROWS

VALUES: list[Any] = [
    None, True, 0, -1, 10**9, 10**12, 2**63 - 1, 10**30, 0.5, float("nan"), float("inf"), 1e300,
    "", "x", "../../etc/passwd", "a\0b", "(a+)+$", "(", "\ud800", "__import__('os').system('x')",
    [], [1], [-1], [10**12], ["x"], [[[[]]]], [[0, 2]] * 50, {}, {"x": 1}, {"(a+)+$": -1},
    {".*": 10**9}, {"x": [1]}, {"a": {"a": {"a": 1}}},
]  # fmt: skip
MEANT = {"task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "shadow_model"}


@pytest.mark.filterwarnings("ignore::graftwork.errors.PeftWarning")  # fields without an effect
@pytest.mark.fault("K1")
@pytest.mark.fault("K4")
@pytest.mark.fault("A7")
@pytest.mark.filterwarnings("ignore::graftwork.errors.PeftWarning")  # of a field without effect
@pytest.mark.parametrize("name", METHODS)
def test_every_field_takes_what_it_means_or_says_what_it_wants(name: str) -> None:
    for field in fields(method(name).config):
        for value in VALUES:
            text = json.dumps({"peft_type": name, field.name: value}).encode()
            try:
                config = config_in(text, "the config")
            except GraftworkError as error:
                assert len(str(error)) < 5000
                assert "the config" in str(error)
            else:
                config.to_json()


def test_the_values_are_tried_in_all_of_them() -> None:
    assert sum(len(fields(method(name).config)) for name in METHODS) * len(VALUES) > 40_000


ROWS_OF = {entry.config().method: entry for entry in ROWS.values()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.fault("K4")
@pytest.mark.filterwarnings("ignore::graftwork.errors.PeftWarning")
@pytest.mark.parametrize("name", ROWS_OF)
def test_what_a_field_takes_is_built_or_refused(name: str, tmp_path: Path) -> None:
    entry = ROWS_OF[name]
    entry.small().save_pretrained(tmp_path)
    place = tmp_path / "a0"
    path = place / "adapter_config.json"
    data = json.loads(path.read_text())
    known = [f.name for f in fields(PeftConfig.from_pretrained(place)) if f.name not in MEANT]
    pairs = [(field, i) for field in known for i in range(len(VALUES))]
    for field, i in pairs[hash_of(name) % 8 :: 8]:  # an eighth; all were tried by hand
        path.write_text(json.dumps({**data, field: VALUES[i]}))
        base = entry.base()
        try:
            config = PeftConfig.from_pretrained(place)
            entry.setup.before(base, config, IDS)
            PeftModel.from_pretrained(base, place, adapter_name="a0")
        except GraftworkError as error:
            assert len(str(error)) < 10_000


def hash_of(name: str) -> int:
    """A number of a name that is the same in every process."""
    return sum(name.encode())
