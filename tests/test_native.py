"""transformers' own add_adapter, save_pretrained and load_adapter, with every method."""

from __future__ import annotations

from pathlib import Path

import pytest

from test_trainer import run_program


@pytest.mark.fault("I5")
@pytest.mark.slow
def test_every_method_is_added_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    for name, found in run_program("native_program.py", str(tmp_path)).items():
        assert "error" not in found, f"{name}: {found}"
        assert found["effect"] > 1e-3, name
        assert max(found["loaded"], found["off"]) < 1e-5 and not found["keys"], f"{name}: {found}"
