"""The pages: their code runs, their tables are the code's, their links lead somewhere."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftwork.table import METHODS, Method
from tiny import build

ROOT = Path(__file__).parents[1]
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
WITH_CODE = [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))]


@pytest.mark.fault("L5")
@pytest.mark.parametrize("page", WITH_CODE, ids=[p.name for p in WITH_CODE])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    build("llama").save_pretrained(tmp_path / "base")
    code = "\n".join(blocks).replace("meta-llama/Llama-3.2-1B", "base")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.fault("L5")
@pytest.mark.parametrize("page", METHOD_PAGES, ids=[p.stem for p in METHOD_PAGES])
def test_the_example_of_a_method_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), names)


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "tables.py"))


def test_the_tables_are_the_codes(tables: dict[str, Any]) -> None:
    pages = tables["pages"]()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/tables.py"
    assert set(METHOD_PAGES) == {path for path in pages if path.parent.name == "methods"}


@pytest.mark.parametrize("page", PAGES + METHOD_PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def messages() -> list[str]:
    """All texts of the library, with "..." for what is put into them."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
                found.append("".join(map(str, parts)))
    return found


def test_messages_of_the_page_on_troubles_are_the_codes() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.*)$", text, re.M)
    every = messages()
    assert len(quoted) > 30
    for message in quoted:
        for part in message.strip(".; ").split("..."):
            assert any(part.strip() in one for one in every), message


@pytest.fixture
def methods() -> Iterator[dict[str, Method]]:
    """The table of methods, put back in its order."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_what_the_pages_lack_is_said(tables: dict[str, Any], methods: dict[str, Method]) -> None:
    row = Method("NEW", "graftwork.methods.lora_config:LoraConfig", "something")
    methods["NEW"] = row
    with pytest.raises(SystemExit, match=r"methods lacks \['NEW'\]; say when to use it"):
        tables["pages"]()
    with pytest.raises(SystemExit, match=r"lacks \['NEW'\]; run: python docs/counts.py"):
        tables["counted"]()
    del methods["NEW"], methods["C3A"]
    with pytest.raises(SystemExit, match=r"methods has \['C3A'\], which the code does not have"):
        tables["pages"]()


@pytest.mark.slow
def test_the_counts_are_the_codes(tables: dict[str, Any]) -> None:
    counts = runpy.run_path(str(ROOT / "docs" / "counts.py"))["count"]()
    assert counts == tables["counted"](), "run: python docs/counts.py"
