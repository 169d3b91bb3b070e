"""Mixed batches: the base once, the adapters in groups, and each row as alone."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from graftwork import (
    IA3Config,
    LoraConfig,
    VeraConfig,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from graftwork.fast import chunks
from graftwork.fast.grouped import Rows, cut
from graftwork.interop.helpers import rescale_adapter_scale
from graftwork.testing import laws
from graftwork.testing.bench import close, shake
from specs import MAIN, METHODS, bench

IN, MID, OUT = 12, 20, 8
ROWS = ["c", "a", "__base__", "b", "a", "c"]
# what only multiplies by gains, or adds a product or a bias, in eval mode
ONE_PASS = (
    "lora adalora vera ia3 beft delora kasa miss mica olora pissa qalora randlora rslora tinylora "
    "unilora vblora osf psoft pvera velora bdlora monteclora"
).split()


class Operations(TorchDispatchMode):
    """Counts what is launched, and the shapes of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        if isinstance(out, Tensor):
            self.shapes.add(tuple(out.shape))
        return out


class Counted(nn.Linear):
    """A layer that counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def net(kind: type[nn.Linear] = Counted) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(IN, MID), nn.Tanh(), kind(MID, OUT)).eval()


def lora(r: int = 4, **options: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=8, target_modules=["0", "2"], **options)


def adapted(kind: type[nn.Linear] = Counted, **configs: Any) -> Any:
    first, *rest = configs
    model = get_peft_model(net(kind), configs[first], first)
    for name in rest:
        model.add_adapter(name, configs[name])
    model.set_requires_grad(list(configs))
    shake(model)
    return model.eval()


def inputs(tokens: int | None = 5, n: int = len(ROWS)) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, IN) if tokens is None else torch.randn(n, tokens, IN)


def alone(model: Any, x: Tensor, rows: list[str] = ROWS) -> Tensor:
    """Each row by itself."""
    outputs = []
    for i, name in enumerate(rows):
        with model.using(*([] if name == "__base__" else [name])):
            outputs.append(model(x[i : i + 1]))
    return torch.cat(outputs)


def three(kind: type[nn.Linear] = Counted) -> Any:
    return adapted(kind, a=lora(4), b=lora(7), c=lora(2))


def base_calls(model: Any) -> list[int]:
    return [m.calls for m in model.modules() if isinstance(m, Counted)]


@pytest.mark.fault("F4")
@pytest.mark.parametrize("tokens", [None, 1, 5, 17])
@pytest.mark.parametrize("graded", [True, False])
def test_rows_are_as_alone_and_the_base_runs_once(tokens: int | None, graded: bool) -> None:
    model, x = three(), inputs(tokens)
    with torch.set_grad_enabled(graded):
        want = alone(model, x)
        before = base_calls(model)
        got = model(x, adapter_names=ROWS)
    close(got, want)
    assert [b - a for a, b in zip(before, base_calls(model), strict=True)] == [1, 1]


@pytest.mark.fault("F4")
def test_products_are_launched_in_groups_and_no_dense_update_is_made() -> None:
    names = [f"a{i}" for i in range(6)]
    model = adapted(**{name: lora(4) for name in names})
    x = inputs()
    with torch.no_grad():
        want = alone(model, x, names)
        model(x, adapter_names=names)
        with Operations() as seen:
            close(model(x, adapter_names=names), want)
    # a layer: its own product, and two batched ones for all six adapters, from stacks that are kept
    assert seen.names["bmm"] == 2 and seen.names["baddbmm_"] == 2
    assert not {"stack", "cat", "index_select", "index_add_", "clone", "mm"} & set(seen.names)
    assert not {(MID, IN), (OUT, MID)} & seen.shapes


def test_ranks_are_cut_at_powers_of_two_where_that_makes_fewer_products() -> None:
    assert cut([(0, 4), (1, 4), (2, 8)]) == {4: [(0, 0), (1, 0)], 8: [(2, 0)]}
    every = [(t, rank) for t, rank in enumerate(range(1, 17))]
    pieces = cut(every)
    assert sorted(pieces) == [1, 2, 4, 8, 16]
    ranks: Counter[int] = Counter()
    for size, found in pieces.items():
        for t, begin in found:
            ranks[t] += size
            assert begin + size <= every[t][1]
    assert [ranks[t] for t, _ in every] == [rank for _, rank in every]  # nothing is padded


def test_many_ranks_take_few_products() -> None:
    names = [f"a{i}" for i in range(8)]
    model = adapted(**{name: lora(i + 1) for i, name in enumerate(names)})
    x = inputs(1, len(names))
    with torch.no_grad():
        want = alone(model, x, names)
        model(x, adapter_names=names)
        with Operations() as seen:
            close(model(x, adapter_names=names), want)
    assert seen.names["bmm"] == seen.names["baddbmm_"] == 2  # one of each at both layers


def cost(ranks: Sequence[int], cuts: Sequence[int]) -> int:
    """What cutting ranks there costs."""
    return sum(
        sum(rank > low for rank in ranks) * (high - low) + chunks.COST
        for low, high in itertools.pairwise(cuts)
    )


def test_ranks_are_cut_where_zeros_and_products_cost_least() -> None:
    random = Random(0)
    for _ in range(30):
        ranks = [random.choice((1, 2, 8, 16, 64, 100, 128)) for _ in range(random.randint(1, 40))]
        cuts, inner = chunks.cut(ranks), sorted({*ranks})[:-1]
        assert cuts[0] == 0 and cuts[-1] == max(ranks)
        every = [
            [0, *some, max(ranks)]
            for n in range(len(inner) + 1)
            for some in itertools.combinations(inner, n)
        ]
        assert cost(ranks, cuts) == min(cost(ranks, one) for one in every)
    ranks = [4 + 60 * i // 63 for i in range(64)]
    cuts = chunks.cut(ranks)
    assert len(cuts) - 1 <= 8
    assert cost(ranks, cuts) - chunks.COST * (len(cuts) - 1) < 1.1 * sum(ranks)
    assert chunks.cut([8] * 5) == [0, 8]


@pytest.mark.parametrize("in_place", [True, False])
def test_products_of_any_ranks_and_rows_are_right(in_place: bool) -> None:
    random, gen = Random(1), torch.Generator().manual_seed(0)
    for case in range(60):
        owners = random.choices(["a", "b", "c", "d", "e", ""], k=random.randint(1, 12))
        rows = Rows(sorted(owners) if case % 2 else owners)
        ranks = random.choices((0, 1, 2, 9, 40, 90), k=len(rows.names))
        terms = tuple((k, ranks[k]) for k, name in enumerate(rows.names) if name)
        a = [torch.randn(r, 5, generator=gen, dtype=torch.double) for _, r in terms]
        b = [torch.randn(4, r, generator=gen, dtype=torch.double) for _, r in terms]
        x = torch.randn(len(owners), 3, 5, generator=gen, dtype=torch.double)
        y = torch.randn(len(owners), 3, 4, generator=gen, dtype=torch.double)
        want = y.clone()
        for (k, _), down, up in zip(terms, a, b, strict=True):
            want[rows.where[k]] += x[rows.where[k]] @ down.mT @ up.mT
        by, before = rows.sorted(terms), y.clone()
        factors = chunks.stacks(by, a, b, torch.double, keep=in_place)
        found = chunks.add(y, x, by, factors, in_place)
        torch.testing.assert_close(found, want)
        assert in_place or torch.equal(y, before)


@pytest.mark.parametrize("learns", [True, False])
def test_the_rows_are_sorted_once_for_all_layers(learns: bool) -> None:
    model, x = three(), inputs()
    switch = model.base_model.switch
    with torch.set_grad_enabled(learns):
        model(x, adapter_names=ROWS)
        (rows,) = switch.batches.values()
        plans: dict[Any, Any] = dict(rows.plans if learns else rows.orders)
        model(x, adapter_names=ROWS)
    assert list(switch.batches.values()) == [rows] and len(plans) == 1
    again: dict[Any, Any] = rows.plans if learns else rows.orders
    assert all(again[terms] is plan for terms, plan in plans.items()) and len(again) == 1
    assert Rows(["b", "a", "b"], ["a", "b"]).names == ("a", "b")
    assert Rows(["b", "a", "b"]).where == [[0, 2], [1]]


@pytest.mark.parametrize("method", [m for m in METHODS if m in ONE_PASS or m in MAIN])
def test_methods_that_add_a_product_or_scale_share_one_pass(method: str) -> None:
    if not METHODS[method].applies("linear"):
        return
    both = bench("linear", method, "lora")
    model = both.model()
    (host,) = model.base_model.hosts().values()
    calls: list[int] = []
    layer = type(host).base

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return layer(self, *args, **kwargs)

    rows = ["a0", "a1", "a0", "__base__"]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(host), "base", counted)
        got = both.run(model, adapter_names=rows)
    assert len(got) == len(rows) and (method not in ONE_PASS or len(calls) == 1)
    laws.mixes_in_a_batch(both)


@pytest.mark.parametrize("feedforward", [[], ["0", "2"], ["2"]])
def test_gains_and_products_in_one_batch(feedforward: list[str]) -> None:
    ia3 = IA3Config(target_modules=["0", "2"], feedforward_modules=feedforward)
    model, x = adapted(a=lora(), b=ia3, c=copy.deepcopy(ia3)), inputs()
    before = base_calls(model)
    close(model(x, adapter_names=ROWS), alone(model, x))
    assert base_calls(model)[0] - before[0] == 1 + len(ROWS)


def test_what_is_neither_takes_a_pass_of_its_own() -> None:
    model, x = adapted(a=lora(), b=lora(use_dora=True), c=lora(3)), inputs()
    want = alone(model, x)
    before = base_calls(model)
    close(model(x, adapter_names=ROWS), want)
    assert base_calls(model)[0] - before[0] == 2  # the LoRAs and the base, and DoRA


def test_several_parts_biases_and_layers_without_an_adapter() -> None:
    model = adapted(
        a=lora(bias="all"),
        b=LoraConfig(r=3, target_modules=["2"]),
        c=lora(lora_bias=True, init_lora_weights="pissa"),
    )
    x = inputs()
    want = alone(model, x)
    before = base_calls(model)
    close(model(x, adapter_names=ROWS), want)
    assert [b - a for a, b in zip(before, base_calls(model), strict=True)] == [1, 1]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tokens", [None, 1, 17])
@pytest.mark.parametrize("rows", [ROWS, ["a", "a", "b", "b", "c", "c"], ["a"] * 6])
def test_gradients_are_those_of_the_rows_alone(tokens: int | None, rows: list[str]) -> None:
    model = adapted(a=lora(), b=lora(7), c=IA3Config(target_modules=["0", "2"]))
    x = inputs(tokens).requires_grad_(True)
    alone(model, x, rows).square().sum().backward()
    want, at_x = gradients(model), x.grad
    x.grad = None
    model(x, adapter_names=rows).square().sum().backward()
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        close(got[name], gradient)
    assert x.grad is not None and at_x is not None
    close(x.grad, at_x)


class Half(nn.Module):
    """A dropout of one's own: the last half of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., : x.shape[-1] // 2], 0 * x[..., x.shape[-1] // 2 :]], -1)


@torch.no_grad()
def test_dropout_is_that_of_each_rows_adapter() -> None:
    model = adapted(a=lora(), b=lora(lora_dropout=0.9), c=lora(lora_dropout=0.5)).train()
    x = inputs()
    got, want = model(x, adapter_names=ROWS), alone(model.eval(), x)
    for i, name in enumerate(ROWS):
        assert torch.allclose(got[i], want[i], atol=1e-5) == (name in ("a", "__base__"))
    for host in model.base_model.hosts().values():
        (part,) = host.parts(("b",))
        part.dropout = Half()
    close(model(x, adapter_names=ROWS), alone(model, x))


def test_dropout_keeps_the_mean() -> None:
    base = nn.Sequential(nn.Linear(IN, MID)).eval()
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], lora_dropout=0.2), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], lora_dropout=0.6))
    model.set_requires_grad(["a", "b"])
    shake(model, 0.3)
    x = inputs(1, 2).expand(2, 4000, IN)
    torch.manual_seed(0)
    with torch.no_grad():
        got = model.train()(x, adapter_names=["a", "b"]).mean(1)
        want = model.eval()(x, adapter_names=["a", "b"])[:, 0]
    close(got, want, 0.05)


def write(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)


def new_data(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def there_and_back(model: Any) -> None:
    model.half().float()


def again(model: Any) -> None:
    model.delete_adapter("b")
    torch.manual_seed(7)
    model.add_adapter("b", lora(3, init_lora_weights=False))


def exchange(model: Any) -> None:
    model.rename_adapter("a", "d")
    model.rename_adapter("b", "a")
    model.rename_adapter("d", "b")


def rescale(model: Any) -> None:
    for part in [p for h in model.base_model.hosts().values() for p in h.parts(("a",))]:
        part.scale *= 2


def replace(model: Any) -> None:
    for part in [p for h in model.base_model.hosts().values() for p in h.parts(("a",))]:
        part.B = nn.Parameter(part.B.detach() * 2)


def double(model: Any) -> None:
    model.double()


def merge_another(model: Any) -> None:
    model.merge_adapter(["a"])


CHANGES: list[Callable[[Any], None]] = [
    write, new_data, there_and_back, again, exchange, rescale, replace, double, merge_another,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@torch.no_grad()
def test_kept_stacks_follow_every_change(change: Callable[[Any], None]) -> None:
    model, x = three(), inputs()
    first = model(x, adapter_names=ROWS)
    change(model)
    x = x.to(next(model.parameters()).dtype)
    want = alone(model, x)
    close(model(x, adapter_names=ROWS), want)
    if change not in (double, merge_another):
        assert not torch.equal(first, want)


@pytest.mark.parametrize("fused", [False, True])
def test_kept_stacks_follow_every_optimizer(fused: bool) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    x, rows = torch.randn(2, 3, 6), ["default", "b"]
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(x, adapter_names=rows)[:1], model(x[:1]))
        model(x).square().sum().backward()
        optimizer.step()


def test_stacks_are_kept_for_frozen_adapters_and_never_for_those_that_learn() -> None:
    model, x = three(), inputs()
    with Operations() as learning:
        model(x, adapter_names=ROWS)
    model.set_requires_grad(["a", "b", "c"], False)
    model(x, adapter_names=ROWS)
    with Operations() as frozen:
        model(x, adapter_names=ROWS)
    assert learning.names["stack"] > 0 and frozen.names["stack"] == 0
    x.requires_grad_(True)
    model(x, adapter_names=ROWS).sum().backward()
    assert x.grad is not None
    host = next(iter(model.base_model.hosts().values()))
    assert not copy.deepcopy(host).stacks.results and host.stacks.results


def test_factors_that_follow_from_few_numbers_are_not_kept() -> None:
    vera = VeraConfig(r=8, target_modules=["0"])
    model = adapted(a=vera, b=copy.deepcopy(vera), c=lora(1))
    with torch.no_grad():
        model(inputs(), adapter_names=ROWS)
        with Operations() as seen:
            model(inputs(), adapter_names=ROWS)
    host = next(iter(model.base_model.hosts().values()))
    assert seen.names["stack"] > 0
    assert all(mix.stacks is None for _, mix in host.stacks.results.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model, x = three(), inputs()
    want = alone(model, x)
    with torch.autocast("cpu", dtype):
        got = model(x, adapter_names=ROWS)
    assert got.dtype == dtype
    close(got.float(), want, 0.05)
    for module in model.modules():
        if isinstance(module, Counted):
            module.to(dtype)  # under adapters in fp32
    got = model(x.to(dtype), adapter_names=ROWS)
    assert got.dtype == dtype
    close(got.float(), want, 0.05)


@torch.no_grad()
def test_an_output_that_a_hook_holds_is_not_written_to() -> None:
    model, x = three(), inputs()
    held: list[Tensor] = []
    layer = model.base_model.hosts()["0"].base_layer
    layer.register_forward_hook(lambda module, args, out: held.append(out))
    model(x, adapter_names=["a"] * 3 + ["b"] * 3)
    close(held[0], nn.functional.linear(x, layer.weight, layer.bias))


@torch.no_grad()
def test_hooks_on_an_adapter_still_run() -> None:
    model, x = three(), inputs()
    model(x, adapter_names=ROWS)
    (part,) = model.base_model.hosts()["0"].parts(("b",))
    seen: list[int] = []
    part.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    close(model(x, adapter_names=ROWS), alone(model, x))
    assert seen[0] == 1


def test_a_compiled_mixed_batch_is_one_graph() -> None:
    model, x = three(nn.Linear), inputs()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x, adapter_names=ROWS), alone(model, x))


@pytest.mark.fault("F6")
def test_loads_switches_and_rescalings_compile_nothing_again() -> None:
    model, x = three(nn.Linear), inputs()
    counter: Any = CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)

    def same() -> None:
        with torch.no_grad():
            close(compiled(x), model(x))

    for name in "abc":  # once for each choice of adapters that the compiled model has not met
        model.set_adapter(name, inference_mode=True)
        same()
    once = counter.frame_count
    for i in range(20):
        model.add_adapter(f"n{i}", lora(3))
        model.set_adapter("abc"[i % 3], inference_mode=True)
        same()
        with rescale_adapter_scale(model, 0.5 + i):
            same()
    model.delete_adapter([f"n{i}" for i in range(20)])
    same()
    assert once == 3 and counter.frame_count == once


def test_a_compiled_mixed_batch_is_not_compiled_again_for_the_same_names() -> None:
    model, x = three(nn.Linear), inputs()
    counter: Any = CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    with torch.no_grad():
        for i in range(5):
            close(compiled(x, adapter_names=ROWS), alone(model, x))
            model.add_adapter(f"n{i}", lora(3))
            write(model)
            rescale(model)
    assert counter.frame_count == 1


def test_loading_into_a_compiled_model_by_hot_swapping_compiles_nothing(tmp_path: Any) -> None:
    model, x = adapted(nn.Linear, a=lora(4)), inputs()
    folders = [str(tmp_path / str(i)) for i in range(5)]
    for folder in folders:
        shake(model)
        model.save_pretrained(folder)
    prepare_model_for_compiled_hotswap(model)
    counter: Any = CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    with torch.no_grad():
        compiled(x)
        for folder in folders:
            hotswap_adapter(model, f"{folder}/a", "a")
            close(compiled(x), model(x))
    assert counter.frame_count == 1
