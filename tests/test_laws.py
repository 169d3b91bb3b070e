"""The laws that hold for every method at every kind of layer."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork import PeftModel
from zoo import CASES, NOT_IDENTITY, SITES, applies, make, shake, x_of

every_case = pytest.mark.parametrize("method, site", CASES)
LOW = [(m, s) for m, s in CASES if m in ("lora", "dora", "adalora", "ia3", "tokens")]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance * 10, atol=tolerance)


def base_tensors(model: PeftModel) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".adapters." not in n}


@every_case
def test_start_is_the_identity(method: str, site: str) -> None:
    model, x = make(site, method, jiggle=0), x_of(site)
    with model.using():
        base = model(x)
    if method in NOT_IDENTITY:
        assert not torch.allclose(model(x), base)
    else:
        close(model(x), base, 1e-6)


@every_case
def test_forward_is_the_folded_weight_and_unmerging_restores_every_bit(
    method: str, site: str
) -> None:
    model, x = make(site, method), x_of(site)
    before = base_tensors(model)
    adapted = model(x)
    with model.using():
        assert not torch.allclose(model(x), adapted), "the adapter has no effect"
    if method == "lora_bias" and "bias" not in SITES[site].tags:
        with pytest.raises(ValueError, match="layer has none"):
            model.merge_adapter()
    else:
        model.merge_adapter()
        close(model(x), adapted)
        model.unmerge_adapter()
    assert torch.equal(model(x), adapted)
    after = base_tensors(model)
    assert all(torch.equal(after[n], t) for n, t in before.items()) and len(after) == len(before)


@every_case
def test_a_merged_model_still_answers_for_every_choice(method: str, site: str) -> None:
    if method == "lora_bias":
        method = "lora_trains_bias" if "bias" in SITES[site].tags else "lora"
    model, x = make(site, method), x_of(site)
    adapted = model(x)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    close(model(x), adapted)


@every_case
def test_gradients_reach_the_adapter_and_nothing_else(method: str, site: str) -> None:
    model, x = make(site, method), x_of(site)
    model.train()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name), name
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


@every_case
def test_unload_gives_back_the_very_model(method: str, site: str) -> None:
    torch.manual_seed(0)
    from zoo import One, config

    model = One(SITES[site].layer()).eval()
    model.l.register_forward_hook(_hook)
    parts = dict(model.named_modules())
    tensors = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    wrapped: Any = PeftModel(model, config(method, site))
    shake(wrapped)
    wrapped(x_of(site))
    back = wrapped.unload()
    assert back is model
    assert {n: id(m) for n, m in back.named_modules()} == {n: id(m) for n, m in parts.items()}
    now = back.state_dict(keep_vars=True)
    assert all(now[n] is t and torch.equal(t, kept) for n, (t, kept) in tensors.items())
    assert len(now) == len(tensors) and list(back.l._forward_hooks.values()) == [_hook]
    assert all(p.requires_grad for p in back.parameters())


def _hook(*_: Any) -> None:
    return None


@every_case
def test_save_then_load_gives_the_same_bits(method: str, site: str, tmp_path: Path) -> None:
    model, x = make(site, method), x_of(site)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    from zoo import One

    loaded: Any = PeftModel.from_pretrained(
        One(SITES[site].layer()).eval(), tmp_path / "a0", adapter_name="a0"
    )
    with torch.no_grad():  # as with gradients, attention would take another kernel
        assert torch.equal(loaded(x), model(x))
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@every_case
def test_copies_and_pickles_are_the_same_model(method: str, site: str) -> None:
    model, x = make(site, method), x_of(site)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        with twin.disable_adapter():
            assert not torch.allclose(twin(x), y)
        shake(twin, seed=2)
        assert not torch.equal(twin(x), y) and torch.equal(model(x), y)


@pytest.mark.parametrize("method, site", LOW)
def test_compiles_without_graph_breaks(method: str, site: str) -> None:
    model, x = make(site, method), x_of(site)
    y = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), y)
    with model.disable_adapter():
        close(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method, site", LOW)
def test_dtypes(method: str, site: str, dtype: torch.dtype) -> None:
    model, x = make(site, method, dtype=dtype), x_of(site, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wide}
    adapted = model(x)
    assert adapted.dtype == dtype
    model.merge_adapter()
    assert {p.dtype for p in model.base_model.model.l.base_layer.parameters()} == {dtype}
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(model(x), adapted, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted)


FAMILIES = (
    "lora lora_bias lora_trains_bias lora_pissa dora adalora ia3 ia3_feedforward tokens"
).split()
PAIRS = [
    (a, b, s)
    for s in ("linear", "conv2d", "conv2d_groups", "embedding", "attention", "experts")
    for a, b in itertools.product(FAMILIES, FAMILIES)
    if applies(a, s) and applies(b, s) and (a, b) != ("tokens", "tokens")
]


@pytest.mark.parametrize("a, b, site", PAIRS)
def test_two_active_adapters_are_one_folded_weight(a: str, b: str, site: str) -> None:
    model, x = make(site, a, b), x_of(site)
    both = model(x)
    for name in ("a0", "a1"):
        with model.using(name):
            assert not torch.allclose(model(x), both)
    with model.using("a1", "a0"):
        swapped = model(x)
    model.merge_adapter()
    close(model(x), both)
    with model.using("a1", "a0"):
        close(model(x), swapped)
    model.unmerge_adapter()
    assert torch.equal(model(x), both)


MIXED = [(a, s) for a, s in CASES if "rows" in SITES[s].tags]


@pytest.mark.parametrize("method, site", MIXED)
def test_each_row_of_a_mixed_batch_is_as_alone(method: str, site: str) -> None:
    other = "dora" if method != "dora" else "lora"
    model, x = make(site, method, other), x_of(site)
    rows = ["a1", "a0", "__base__", "a0"]
    mixed = model(x, adapter_names=rows)
    for i, name in enumerate(rows):
        with model.using(*([] if name == "__base__" else [name])):
            close(mixed[i], model(x)[i], 1e-6)
