"""Products of adapters that learn in one batch: their gradients, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import LoraConfig, get_peft_model
from graftwork.fast.grouped import Rows
from graftwork.fast.learned import Leaves, add

BATCHES = [  # the adapter of each row, and the adapters' ranks
    (["a", "a", "b", "b"], (3, 3)),
    (["a", "b", "a", "c"], (3, 2, 4)),
    (["a", "b", "c", "d", "e"], (1, 2, 3, 4, 5)),  # cut into pieces
    (["a", "a", "b"], (2, 2)),
    (["a", "b"], (2, 0)),
]


@pytest.mark.parametrize(("owners", "ranks"), BATCHES)
def test_gradients_are_right_and_can_be_differentiated(
    owners: list[str], ranks: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    rows = Rows(owners)
    groups = rows.plan(tuple(enumerate(ranks)))
    scales = [1.0 + k for k in range(len(ranks))]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.double, requires_grad=True)

    x, y = drawn(len(owners), 3, 5), drawn(len(owners), 3, 4)
    a, b = [drawn(r, 5) for r in ranks], [drawn(4, r) for r in ranks]

    def sums(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        n = len(ranks)
        return add(y, x, groups, Leaves(factors[:n], factors[n:], scales, torch.double))

    found = sums(y, x, *a, *b)
    for i, k in enumerate(rows.names.index(name) for name in owners):
        torch.testing.assert_close(found[i], y[i] + scales[k] * x[i] @ a[k].mT @ b[k].mT)
    assert torch.autograd.gradcheck(sums, (y, x, *a, *b))
    assert torch.autograd.gradgradcheck(sums, (y, x, *a, *b))


def nodes(loss: Tensor) -> Iterator[str]:
    """The names of what a backward runs."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield type(node).__name__
        left += [child for child, _ in node.next_functions]


@pytest.mark.fault("F5")
@pytest.mark.parametrize("adapters", [2, 8])
def test_a_layer_is_one_node_whatever_the_adapters(adapters: int) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    names = [f"a{i}" for i in range(adapters)]
    for i, name in enumerate(names):
        config = LoraConfig(r=2, lora_alpha=1 + i, target_modules=["0", "2"])
        if i:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
    model.set_requires_grad(names)
    model.train()
    loss = model(torch.randn(adapters, 9, 6), adapter_names=names).square().mean()
    counts = Counter(nodes(loss))
    assert counts["ProductsBackward"] == 2
    assert counts["AccumulateGrad"] == 4 * adapters
    assert counts.total() - counts["AccumulateGrad"] < 15
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.is_contiguous() for g in grads)
