"""The laws that hold for every method at every kind of layer."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.testing import check_method, laws
from graftwork.testing.bench import Setup, close
from graftwork.testing.blocks import blocks
from graftwork.testing.entry import IDS
from graftwork.testing.layers import Kind
from specs import CASES, MAIN, METHODS, bench

COMPILED = [(m, k) for m, k in CASES if m in MAIN]
FAMILIES = [m for m in MAIN if m in ("lora", "dora", "adalora", "ia3", "tokens", "vera", "loha")]
EVERY = [*MAIN, "arrow", "xlora"]
PAIRS = [
    (a, b, k)
    for k in ("linear", "linear_3d", "conv2d", "conv2d_groups", "embedding", "attention", "experts")
    for a, b in itertools.product(*[EVERY if k.startswith("linear") else FAMILIES] * 2)
    if METHODS[a].applies(k) and METHODS[b].applies(k) and (a, b) != ("tokens", "tokens")
    if k != "linear_3d" or "xlora" in (a, b)  # which scales tokens, so there have to be some
]
DROPOUTS = [
    (m, f.name)
    for m in MAIN
    if METHODS[m].applies("linear")
    for f in fields(METHODS[m].config())
    if "dropout" in f.name and f.type in ("float", "float | None")
]
LAYERS_OF_BLOCKS = Kind(
    blocks, IDS, "a layer of each block", fields={"target_modules": {"q_proj"}}, whole=True
)
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.fault("J4")
@pytest.mark.fault("H1")
@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("method, kind", CASES)
def test_law(law: str, method: str, kind: str) -> None:
    laws.LAWS[law](bench(kind, method))


@pytest.mark.parametrize("method, kind", CASES)
def test_start(method: str, kind: str) -> None:
    if METHODS[method].identity:
        laws.starts_as_identity(bench(kind, method))
    else:
        model: Any = bench(kind, method).model(jiggle=0)
        with pytest.raises(AssertionError), model.disable_adapter():
            base = bench(kind, method).run(model)
            with model.using("a0"):
                close(bench(kind, method).run(model), base, 1e-6)


@pytest.mark.parametrize("method, kind", COMPILED)
def test_compiles(method: str, kind: str) -> None:
    laws.compiles_without_graph_breaks(bench(kind, method))


@pytest.mark.parametrize("method", EVERY)
def test_a_report_has_a_row_for_each_layer(method: str) -> None:
    report = bench(METHODS[method].kinds[0], method).model().adapters()
    assert "a0" in {row.adapter for row in report} and "a0" in str(report)


@pytest.mark.fault("C5")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method, kind", COMPILED)
def test_dtypes(method: str, kind: str, dtype: torch.dtype) -> None:
    laws.works_in(dtype, bench(kind, method))


# what has no meaning beside the case's other fields, so that the config refuses it
NO_DROPOUT = {("miss_bat", "miss_dropout"), ("supertuning", "lora_dropout")}


@pytest.mark.parametrize("method, name", DROPOUTS)
def test_dropout(method: str, name: str) -> None:
    if (method, name) in NO_DROPOUT:
        with pytest.raises(ValueError, match=name):
            replace(METHODS[method].config(), **{name: 0.5})
        return
    laws.dropout_acts_in_training_alone(bench("linear", method), name)


@pytest.mark.fault("C4")
@pytest.mark.fault("D5")
@pytest.mark.fault("L2")
@pytest.mark.parametrize("a, b, kind", PAIRS)
def test_two_active_adapters_are_one_folded_weight(a: str, b: str, kind: str) -> None:
    laws.stacks_with_another(bench(kind, a, b))


@pytest.mark.parametrize("a, b, kind", PAIRS)
def test_each_row_of_a_mixed_batch_is_as_alone(a: str, b: str, kind: str) -> None:
    laws.mixes_in_a_batch(bench(kind, a, b))


@pytest.mark.parametrize("method", [m for m in EVERY if METHODS[m].applies("linear_3d")])
def test_a_shadow_over_the_blocks_lives_with_every_other(method: str) -> None:
    for law in (laws.stacks_with_another, laws.mixes_in_a_batch):
        both = bench(LAYERS_OF_BLOCKS, "shadow", method)
        both.setups = [Setup(before=at_blocks), both.setup(1)]
        law(both)


@pytest.mark.parametrize("method", [m for m, case in METHODS.items() if "blocks" in case.needs])
def test_what_sits_at_no_layer_is_checked_in_a_whole_model(method: str) -> None:
    report = check_method(METHODS[method].config(), METHODS[method].call, show=False)
    assert {law: told for law, told in report.rows["whole"].items() if told != "yes"} == {}
    assert "a transformer of two blocks      11 laws hold" in str(report)


def at_blocks(model: nn.Module, config: Any, x: Tensor) -> None:
    config.target_modules = None
