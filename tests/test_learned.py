"""Products of adapters that learn in one batch: their gradients, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import LoraConfig, Run, get_peft_model, train_together
from graftwork.fast import learned, plain_path
from graftwork.fast.grouped import Rows
from graftwork.fast.learned import Leaves, add
from graftwork.fast.many import many
from graftwork.fast.stack import Stacks

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


def test_what_a_layer_gave_is_overwritten_only_where_its_backward_does_not_need_it() -> None:
    torch.manual_seed(0)
    rows = Rows(["a", "b"])
    groups = rows.plan(((0, 2), (1, 2)))
    leaves = Leaves(torch.randn(2, 2, 3), torch.randn(2, 4, 2), [1.0, 2.0], torch.float)
    x, weight = torch.randn(2, 5, 3, requires_grad=True), torch.randn(4, 3)
    for bias in (None, torch.randn(4)):
        y = nn.functional.linear(x, weight, bias)
        before = y.detach().clone()
        found = add(y, x, groups, leaves)
        assert found.data_ptr() == y.data_ptr()
        low = torch.stack([leaves.scales[k] * x[k] @ leaves.a[k].mT @ leaves.b[k].mT
                           for k in range(2)])  # fmt: skip
        torch.testing.assert_close(found, before + low)
    leaf = torch.randn(2, 5, 4, requires_grad=True)
    y = leaf.exp()
    add(y, x, groups, leaves).sum().backward()
    torch.testing.assert_close(leaf.grad, leaf.detach().exp())


@pytest.mark.parametrize("k", [1.0, 2.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_with_all_its_adapters_is_right_and_can_be_differentiated(
    bias: bool, k: float
) -> None:
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.double, requires_grad=True)

    p, q, w = drawn(4, 3, 5), drawn(4, 3, 5), torch.randn(6, 5, dtype=torch.double)
    shift, b, a = drawn(6) if bias else None, drawn(2, 2, 6), drawn(2, 2, 5)
    given = [one for one in (p, q, b, a, shift) if one is not None]

    def of_a_product(p: Tensor, q: Tensor, b: Tensor, a: Tensor, *bias: Tensor) -> Tensor:
        return many(p * q, w, bias[0] if bias else None, b, a, k)

    found, x = of_a_product(*given), p * q
    for i in range(4):
        low = k * x[i] @ a[i // 2].mT @ b[i // 2]
        torch.testing.assert_close(found[i], nn.functional.linear(x[i], w, shift) + low)
    assert torch.autograd.gradcheck(of_a_product, given)
    assert torch.autograd.gradgradcheck(of_a_product, given)


@pytest.mark.parametrize("change", ["none", "hook", "scales", "dropout", "bf16", "plain path"])
def test_runs_at_a_layer_are_one_node_with_it_where_that_is_all(change: str) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    if change == "hook":
        for layer in (model[0], model[2]):
            layer.register_forward_hook(lambda *_: None)
    if change == "bf16":
        model.bfloat16()
    drop = 0.5 if change == "dropout" else 0.0
    alphas = {f"r{i}": 4 + i if change == "scales" else 4 for i in range(3)}
    runs = [
        Run(n, LoraConfig(r=2, lora_alpha=a, target_modules=["0", "2"], lora_dropout=drop), steps=2)
        for n, a in alphas.items()
    ]
    seen: list[Counter[str]] = []

    def loss(outputs: Any, batch: Any) -> Tensor:
        value: Tensor = (outputs.float() - batch["y"]).square().mean()
        seen.append(Counter(nodes(value)))
        return value

    dtype = model[0].weight.dtype
    data = [{"input": torch.randn(2, 6, dtype=dtype), "y": torch.randn(2, 6)} for _ in range(2)]
    with plain_path() if change == "plain path" else nullcontext():
        train_together(model, runs, data, loss=loss)
    one = change in ("none", "bf16")
    assert {c["ManyBackward"] for c in seen} == {2 if one else 0}
    assert {c["ProductsBackward"] for c in seen} == {0 if one else 2}


def stacked(adapters: int) -> tuple[Stacks, list[Tensor], list[Tensor]]:
    """Stacks, and what may be in them: A (2, 3) and B (4, 2) of each adapter."""
    torch.manual_seed(0)
    a = [nn.Parameter(torch.randn(2, 3)) for _ in range(adapters)]
    b = [nn.Parameter(torch.randn(4, 2)) for _ in range(adapters)]
    return Stacks([*a, *b]), a, b


def test_a_stack_is_read_and_written_by_its_factors() -> None:
    stacks, a, b = stacked(3)
    before = [one.detach().clone() for one in (*a, *b)]
    stack = stacks.of(a, b)
    assert stack is not None and stacks.of(a, b) is stack
    for one, old in zip((*a, *b), before, strict=True):
        torch.testing.assert_close(one.detach(), old)
    with torch.no_grad():
        b[1].fill_(7)
    assert bool((stack.up[1] == 7).all()) and bool((stack.up[0] != 7).all())
    assert stacks.of(a[:2], b[:2]) is None  # they lie in another
    stacks.release(a[:1])
    assert not stacks.made and stacks.of(a[:2], b[:2]) is not None
    stacks.release()
    for one in (*a, *b):
        assert one.is_contiguous()
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


def test_a_stack_shares_gradients_with_those_from_elsewhere() -> None:
    stacks, a, b = stacked(2)
    stack: Any = stacks.of(a, b)
    groups = Rows(["a", "b"]).plan(((0, 2), (1, 2)))
    x = torch.randn(2, 5, 3)
    loss = add(torch.zeros(2, 5, 4), x, groups, learned.leaves(
        a, b, [1.0, 2.0], torch.float, groups, stacks
    )).square().sum() + b[1].square().sum()  # fmt: skip
    loss.backward()
    found = stacks.share()
    assert stack.shared and all(one.grad is None for one in (*a, *b))
    other = [one.detach().clone().requires_grad_() for one in (*a, *b)]
    low = [(k + 1) * x[k] @ other[k].mT @ other[2 + k].mT for k in range(2)]
    (sum(y.square().sum() for y in low) + other[3].square().sum()).backward()
    for i, (one, plain) in enumerate(zip((*a, *b), other, strict=True)):
        grad = found[id(one)]
        torch.testing.assert_close(grad.mT if i >= 2 else grad, plain.grad)
    stacks.forget()
    assert stack.down.grad is None and not stacks.share()


def test_what_is_listened_to_or_moved_or_frozen_is_in_no_stack() -> None:
    stacks, a, b = stacked(2)
    handle = b[0].register_hook(lambda g: g)
    assert stacks.of(a, b) is None
    handle.remove()
    assert stacks.of(a, b) is not None
    a[0].requires_grad_(False)
    stacks.release([])
    assert not stacks.made and stacks.of(a, b) is None
    a[0].requires_grad_(True)
    assert stacks.of(a, b) is not None
    a[1].data = moved = torch.ones(2, 3)
    stacks.release([])
    assert not stacks.made and a[1].data_ptr() == moved.data_ptr()
