"""The page on faults is that of the tests' markers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_that_of_the_tests() -> None:
    page = runpy.run_path(str(DOCS / "reliability.py"))
    assert (DOCS / "reliability.md").read_text(encoding="utf-8") == page["page"](), (
        "run: python docs/reliability.py"
    )


def test_a_fault_without_a_test_is_told(tmp_path: Path) -> None:
    page = runpy.run_path(str(DOCS / "reliability.py"))
    text = "- section: x\n  rows:\n    Z9: {met: a, threads: peft#1, here: b}\n"
    page["page"].__globals__["FAULTS"] = tmp_path / "faults.yaml"
    (tmp_path / "faults.yaml").write_text(text)
    with pytest.raises(SystemExit, match=r"no test is marked with \['Z9'\]"):
        page["page"]()
    (tmp_path / "faults.yaml").write_text(text.replace("Z9", "A1"))
    with pytest.raises(SystemExit, match=r"which faults.yaml does not have"):
        page["page"]()
