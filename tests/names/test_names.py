"""Modules and adapters under the nastiest names, with every method: saved, loaded, set, renamed,
merged and deleted, all of it bit-exact.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nasty import ADAPTER, Named, trees
from safetensors import safe_open
from torch import Tensor, nn

from graftwork import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from graftwork.model.functional import user_model
from graftwork.testing.bench import Setup, shake
from graftwork.testing.entry import IDS, Entry
from specs import ROWS

EXAMPLES = int(os.environ.get("NAMES_EXAMPLES", "2"))  # more of them by hand
QUIET = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 10,
    database=None,
    phases=[Phase.generate],  # an example is small as it is
    suppress_health_check=list(HealthCheck),
)


class Trial:
    """A row of the matrix on a model whose modules have given names; two adapters and a LoRA."""

    def __init__(
        self, entry: Entry, tree: Any, names: list[str], extras: tuple[bool, bool]
    ) -> None:
        self.entry, self.tree, self.names = entry, tree, names
        self.extras, self.plain = extras, self.base()

    def base(self) -> Any:
        torch.manual_seed(0)
        return (Named(*self.tree) if self.entry.kinds else self.entry.model(False)).eval()

    def config(self, config: Any, **options: Any) -> Any:
        """The config at this model's layers."""
        if self.entry.kinds:
            base = self.plain
            tokens = config.method == "TRAINABLE_TOKENS"
            config.target_modules = {base.embed} if tokens else set(base.layers)
            for name in getattr(config, "SUBSETS", ()):
                if getattr(config, name):
                    setattr(config, name, set(base.layers))
            if blocks := getattr(config, "use_bdlora", None):
                config.use_bdlora = replace(blocks, target_modules_bd_a=sorted(base.layers))
            if router := getattr(config, "arrow_config", None):
                router.rng_seed = 0  # it is no part of a file, and finds its directions by chance
        for name, value in options.items():
            setattr(config, name, value)
        return config

    def options(self) -> dict[str, Any]:
        if not self.entry.kinds:
            return {}
        base, (saved, tokens) = self.plain, self.extras
        tokens = tokens and self.entry.config().method != "TRAINABLE_TOKENS"
        return {
            **({"modules_to_save": [base.head]} if saved else {}),
            **({"trainable_token_indices": {base.embed: [1, 3]}} if tokens else {}),
        }

    def attached(self) -> Any:
        """The model with its adapters, moved away from the start."""
        first, second, third = self.names
        entry = self.entry
        model = entry.setup.attach(
            self.base(), self.config(entry.config(), **self.options()), first, IDS
        )
        other = self.config((entry.other or entry.config)())
        model = entry.setup.attach(model, other, second, IDS)
        if entry.kinds:
            lora = LoraConfig(r=2, target_modules=set(self.plain.layers), bias="all")
            model.add_adapter(third, lora)
        model.set_requires_grad(self.own)
        shake(model)
        return model.eval()

    def loaded(self, folder: str) -> Any:
        """All of them in a fresh model."""
        model = self.base()
        for name in self.own:
            setup = self.entry.setup if name in self.names[:2] else Setup()
            path = folder if name == "default" else f"{folder}/{name}"
            model = setup.load(user_model(model), path, name, IDS)
        return model.eval()

    @property
    def own(self) -> list[str]:
        return self.names if self.entry.kinds else self.names[:2]

    def outputs(self, model: Any) -> dict[str, Tensor]:
        """What each adapter answers."""
        out = {}
        for name in self.own:
            call = self.entry.call if name in self.names[:2] else {}
            with torch.no_grad(), model.using(name):
                out[name] = model(IDS, **call)
        return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.fault("A3")
@pytest.mark.fault("A8")
@pytest.mark.parametrize("row", ROWS)
@QUIET
@given(
    tree=trees(),
    names=st.lists(ADAPTER, min_size=3, max_size=3, unique=True),
    extras=st.tuples(st.booleans(), st.booleans()),
)
def test_names_mean_nothing(
    row: str, tree: Any, names: list[str], extras: tuple[bool, bool]
) -> None:
    trial = Trial(ROWS[row], tree, names, extras)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trial.attached()
        want = trial.outputs(model)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for name in trial.own:
                place = Path(folder) if name == "default" else Path(folder, name)
                assert names_in(place) == get_peft_model_state_dict(model, adapter_name=name).keys()
            loaded = trial.loaded(folder)
        same(trial.outputs(loaded), want)
        shake(loaded, seed=3)
        for name in trial.own:  # and from one model's tensors to another's
            tensors = get_peft_model_state_dict(model, adapter_name=name)
            set_peft_model_state_dict(loaded, tensors, name)
        same(trial.outputs(loaded), want)
        ends(trial, model, want)


def ends(trial: Trial, model: Any, want: dict[str, Tensor]) -> None:
    """Renamed, deleted and unloaded, nothing is left but the user's model."""
    first, second, *_ = trial.own
    model.base_model.rename_adapter(first, "renamed")
    with torch.no_grad(), model.using("renamed"):
        assert torch.equal(model(IDS, **trial.entry.call), want[first])
    model.base_model.rename_adapter("renamed", first)
    base = trial.plain
    model.delete_adapter(second)
    assert second not in model.peft_config
    plain = model.unload() if trial.extras[0] else unmerged(model, first)
    mine = plain.state_dict()
    assert list(mine) == list(base.state_dict())
    assert all(torch.equal(mine[name], tensor) for name, tensor in base.state_dict().items())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in base.named_modules()]


def unmerged(model: Any, name: str) -> nn.Module:
    """The model after merging an adapter and undoing it, where that is possible."""
    parts = [p for h in model.base_model.hosts().values() for _, p in h.parts_of(name)]
    if not any("merge" in part.FORBIDS for part in parts):
        model.merge_adapter([name])
        model.unmerge_adapter()
    plain: nn.Module = model.unload()
    return plain
