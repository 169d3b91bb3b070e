"""Loading into an adapter that is there, and hot-swapping: where that breaks off, at whichever
operation, the adapter is the old one, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shapes import bits
from torch.utils._python_dispatch import TorchDispatchMode

from graftwork import get_peft_model_state_dict, set_peft_model_state_dict
from graftwork.testing.bench import shake
from specs import ROWS

MOST = 12  # places that are tried, spread over all operations


class BrokenOffError(Exception):
    """What breaks loading off."""


class Breaks(TorchDispatchMode):
    """Raises once, at the operation of this number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise BrokenOffError
        return func(*args, **(kwargs or {}))


def all_of(entry: Any, model: Any) -> Any:
    """Everything about an adapter: its config, its file, every tensor in it, what it answers."""
    config = json.loads(model.peft_config["a0"].to_json())
    own = {n: t for n, t in model.state_dict(keep_vars=True).items()}
    every = {n: id(t) for n, t in own.items()}
    saved = get_peft_model_state_dict(model, None, "a0")
    return str(config), bits(saved), bits(own), every, bits({"y": entry.run(model)})


QUICK = "LORA ADALORA LILY FROD XLORA PREFIX_TUNING".split()


@pytest.mark.fault("F7")
@pytest.mark.parametrize("how", ["load", "swap", "state"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_what_breaks_off_leaves_the_old_adapter(name: str, how: str, tmp_path: Path) -> None:
    entry = ROWS[name]
    entry.small().save_pretrained(tmp_path / "own")
    model, other = (entry.loaded(str(tmp_path / "own"), is_trainable=x) for x in (False, True))
    shake(other, seed=7)
    other.save_pretrained(tmp_path)
    tensors = get_peft_model_state_dict(other, None, "a0")
    ways: dict[str, Callable[[], Any]] = {
        "load": lambda: model.load_adapter(tmp_path / "a0", "a0"),
        "swap": lambda: model.hotswap_adapter(tmp_path / "a0", "a0"),
        "state": lambda: set_peft_model_state_dict(model, tensors, "a0"),
    }
    with Breaks(0) as mode:
        try:
            ways[how]()
        except (ValueError, RuntimeError):  # this method's adapters cannot be exchanged so
            assert how == "swap"
    last = mode.count
    after = all_of(entry, model)
    model = entry.loaded(str(tmp_path / "own"))
    before = all_of(entry, model)
    for at in sorted({1 + i * last // MOST for i in range(MOST)} | {last}):
        try:
            with Breaks(at):
                ways[how]()
        except (BrokenOffError, RuntimeError, ValueError):
            assert all_of(entry, model) == before, f"broken off at {at} of {last}"
            continue
        raise AssertionError(f"not broken off at {at} of {last}")
    if how != "swap":
        ways[how]()
        assert all_of(entry, model)[:2] == after[:2]
