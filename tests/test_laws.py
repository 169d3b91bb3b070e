"""The laws that hold for every method at every kind of layer."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from graftwork.testing import laws
from graftwork.testing.bench import Bench, close
from specs import CASES, MAIN, METHODS

COMPILED = [(m, k) for m, k in CASES if m in MAIN]
FAMILIES = [m for m in MAIN if m in ("lora", "dora", "adalora", "ia3", "tokens", "vera", "loha")]
PAIRS = [
    (a, b, k)
    for k in ("linear", "conv2d", "conv2d_groups", "embedding", "attention", "experts")
    for a, b in itertools.product(*[MAIN if k == "linear" else FAMILIES] * 2)
    if METHODS[a].applies(k) and METHODS[b].applies(k) and (a, b) != ("tokens", "tokens")
]
DROPOUTS = [
    (m, f.name)
    for m in MAIN
    if METHODS[m].applies("linear")
    for f in fields(METHODS[m].config())
    if "dropout" in f.name and f.type in ("float", "float | None")
]
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


def bench(kind: str, *methods: str) -> Bench:
    call = {key: value for m in methods for key, value in METHODS[m].call.items()}
    return Bench(kind, [METHODS[m].config() for m in methods], call)


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


@pytest.mark.parametrize("a, b, kind", PAIRS)
def test_two_active_adapters_are_one_folded_weight(a: str, b: str, kind: str) -> None:
    laws.stacks_with_another(bench(kind, a, b))


@pytest.mark.parametrize("a, b, kind", PAIRS)
def test_each_row_of_a_mixed_batch_is_as_alone(a: str, b: str, kind: str) -> None:
    laws.mixes_in_a_batch(bench(kind, a, b))
