"""Every cell of the matrix is measured, and the packaged matrix is what is measured.

``pytest tests/test_matrix.py -p no:xdist --write-matrix`` writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from graftwork import METHODS, capabilities
from graftwork.testing import matrix
from specs import ROWS

MEASURED: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def written(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the option, what was measured becomes the packaged matrix."""
    yield
    if request.config.getoption("--write-matrix"):
        order = [n for n in METHODS if n in MEASURED] + [n for n in MEASURED if n not in METHODS]
        data = {
            "ours": {name: MEASURED[name] for name in order},
            "peft": capabilities.load()["peft"],
        }
        text = json.dumps(data, indent=0, ensure_ascii=False)
        capabilities.PATH.write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize("capability", matrix.CAPABILITIES)
@pytest.mark.parametrize("row", ROWS)
def test_cell(row: str, capability: str, request: pytest.FixtureRequest) -> None:
    cell = matrix.measure(ROWS[row], capability)
    MEASURED.setdefault(row, {})[capability] = cell
    assert not cell.startswith("no"), cell
    if not request.config.getoption("--write-matrix"):
        assert capabilities.load()["ours"][row][capability] == cell


@pytest.mark.fault("H1")
def test_the_matrix_has_no_holes(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-matrix"):
        pytest.skip("it is being written")
    ours = capabilities.load()["ours"]
    assert set(ours) == set(ROWS)
    assert all(list(cells) == list(capabilities.MEANING) for cells in ours.values())
    assert list(matrix.CAPABILITIES) == list(capabilities.MEANING)
    cells = [cell for row in ours.values() for cell in row.values()]
    assert not [cell for cell in cells if cell.startswith(("no", "part"))]
    assert sum(cell.startswith("impossible: ") for cell in cells) <= 55


def test_the_matrix_is_printed_beside_pefts() -> None:
    shown = capabilities.text()
    assert "impossible, each refused" in shown
    for row in capabilities.load()["ours"]:
        assert f"\n{row} " in shown or f"\n{row}\n " in shown
