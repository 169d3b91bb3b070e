"""Nasty names on the other ways in and out: combining, hot-swapping, injecting without a wrapper,
transformers' own methods, and the real peft.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nasty import ADAPTER, ADAPTERS, Named, trees
from safetensors.torch import load_file
from torch import Tensor, nn

import graftwork as g
from graftwork import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from graftwork.model import functional
from graftwork.testing.bench import close, shake
from graftwork.testing.entry import IDS
from test_trainer import run_program

EXAMPLES = int(os.environ.get("NAMES_EXAMPLES", "8"))  # more of them by hand
QUIET = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 20,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
NAMES = st.lists(ADAPTER, min_size=3, max_size=3, unique=True)


def base(tree: Any) -> Any:
    torch.manual_seed(0)
    return Named(*tree).eval()


def answer(model: Any, *names: str) -> Tensor:
    with torch.no_grad(), functional.using(model, *names):
        return model(IDS)  # type: ignore[no-any-return]


def place(folder: str, name: str) -> str:
    return folder if name == "default" else f"{folder}/{name}"


@pytest.mark.fault("A3")
@QUIET
@given(tree=trees(), names=NAMES, whole=st.booleans())
def test_combined_swapped_and_injected(tree: Any, names: list[str], whole: bool) -> None:
    first, second, third = names
    plain = base(tree)
    config = LoraConfig(
        r=2, target_modules=plain.layers, modules_to_save=[plain.head] if whole else None
    )
    model = get_peft_model(plain, config, first)
    model.add_adapter(second, config)
    model.set_requires_grad([first, second])
    shake(model)
    model.eval()
    one, two = answer(model, first), answer(model, second)
    if not whole:  # copies of a module are no updates
        model.add_weighted_adapter([first, second], [1.0, 1.0], third, "linear")
        with torch.no_grad(), model.using(first, second):
            close(answer(model, third), model(IDS))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = PeftModel.from_pretrained(base(tree), place(folder, first), third)
        assert torch.equal(answer(other, third), one)
        other.hotswap_adapter(place(folder, second), third)
        assert torch.equal(answer(other, third), two)
    bare = inject_adapter_in_model(config, base(tree), first)
    inject_adapter_in_model(config, bare, second)
    tensors = get_peft_model_state_dict(model, adapter_name=first)
    set_peft_model_state_dict(bare, tensors, second)  # with base_model.model. in front
    assert torch.equal(answer(bare, second), one)
    set_peft_model_state_dict(bare, get_peft_model_state_dict(bare, adapter_name=second), first)
    assert torch.equal(answer(bare, first), one)


LIKE_WRAPPERS = [
    (("base_model", "model"), ("e", "layers", "head"), ("up", "down", "norm")),
    (("base_model",), ("model", "layers", "head"), ("up", "down", "norm")),
    (("_orig_mod",), ("e", "_orig_mod", "head"), ("_orig_mod", "down", "norm")),
    (("m",), ("e", "_fsdp_wrapped_module", "head"), ("up", "_checkpoint_wrapped_module", "n")),
    (("/",), ("/x", "/", "head"), ("/", "a:b", "::")),
]


@pytest.mark.fault("A3")
@pytest.mark.parametrize("tree", LIKE_WRAPPERS, ids=str)
def test_paths_that_look_like_those_of_wrappers(tree: Any, tmp_path: Path) -> None:
    plain = base(tree)
    for name, config in {
        "lora": LoraConfig(r=2, target_modules=plain.layers, modules_to_save=[plain.head]),
        "vera": g.VeraConfig(r=2, target_modules=plain.layers),
        "ada": g.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=plain.layers),
    }.items():
        model = get_peft_model(base(tree), config).eval()
        shake(model)
        assert {row.site for row in model.adapters()} >= plain.layers
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(base(tree), tmp_path / name, is_trainable=True).eval()
        assert torch.equal(answer(loaded, "default"), answer(model, "default"))
        bare = inject_adapter_in_model(config, base(tree))
        shake(bare, seed=4)
        want = answer(bare, "default")
        tensors = {n: t.clone() for n, t in get_peft_model_state_dict(bare).items()}
        shake(bare, seed=5)
        set_peft_model_state_dict(bare, tensors)
        assert torch.equal(answer(bare, "default"), want)


@pytest.mark.fault("A3")
def test_a_parameter_with_a_colon(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_parameter("a:b", nn.Parameter(torch.randn(3, 8, 8)))
            self.is_transposed = False

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,bi->bo", getattr(self, "a:b"), x)

    x = torch.randn(4, 8)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.a:b"])
    model = get_peft_model(nn.Sequential(Odd()), config).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(Odd()), tmp_path)
    assert torch.equal(loaded(x), model(x))
    model.merge_adapter()
    close(model(x), loaded(x))


@pytest.mark.fault("A3")
def test_adapters_of_transformers(tmp_path: Path) -> None:
    step = 1 if EXAMPLES > 8 else 6
    report = run_program("names/names_program.py", str(tmp_path), str(step))
    assert set(report) == set(ADAPTERS[::step])
    for name, found in report.items():
        assert found == {"loaded": 0.0, "keys": [], "left": []}, f"{name}: {found}"


KINDS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2},
    "IA3Config": {"feedforward_modules": []},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "VeraConfig": {"r": 2},
    "OFTConfig": {"r": 0, "oft_block_size": 4},
    "AdaLoraConfig": {"init_r": 2, "total_step": 10},
}


@pytest.mark.fault("A3")
@QUIET
@given(
    tree=trees(),
    name=ADAPTER,
    kind=st.sampled_from(sorted(KINDS)),
    extras=st.tuples(st.booleans(), st.booleans()),
)
def test_files_have_the_names_of_pefts(
    tree: Any, name: str, kind: str, extras: tuple[bool, bool]
) -> None:
    peft = pytest.importorskip("peft", reason="compares with the real peft")
    plain = base(tree)
    options = {**KINDS[kind], "target_modules": sorted(plain.layers)}
    options |= {"modules_to_save": [plain.head]} if extras[0] else {}
    if kind == "LoraConfig" and extras[1]:
        options["trainable_token_indices"] = {plain.embed: [1, 3]}
    ours = get_peft_model(plain, getattr(g, kind)(**options), name).eval()
    shake(ours)
    want = answer(ours, name)
    with TemporaryDirectory() as mine, TemporaryDirectory() as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(mine)
        try:
            theirs = peft.get_peft_model(bare(tree), getattr(peft, kind)(**options), name)
            theirs.save_pretrained(other)
            names, own = (load_file(f"{place(f, name)}/{FILE}").keys() for f in (other, mine))
            loaded = peft.PeftModel.from_pretrained(bare(tree), place(mine, name), name)
        except Exception as error:
            assert beyond_peft(tree, name), error
            return
        if names != own:  # it takes the adapter's name, or what is called as a tensor, out of paths
            assert beyond_peft(tree, name), names ^ own
            return
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(IDS), want)


def beyond_peft(tree: Any, name: str) -> bool:
    """Whether PEFT 0.21.2 may take names apart wrongly: it looks for an adapter's name and for
    tensors' names in paths, makes regular expressions of paths, and keeps adapters in a ModuleDict,
    whose own attributes none may be called as.
    """
    words = {word for level in tree for word in level} | {"0", "1", "weight", "bias"}
    odd = any(set(word) & set("()[]{}*+?|\\^$") for word in words)
    return odd or name in words or bool(words & {"vera_A", "oft_r"}) or name in dir(nn.ModuleDict())


FILE = "adapter_model.safetensors"


def bare(tree: Any) -> nn.Module:
    """The model without a config, which PEFT wants to be transformers'."""
    model = base(tree)
    del model.config
    return model  # type: ignore[no-any-return]
