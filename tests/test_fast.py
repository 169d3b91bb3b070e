"""The fast path computes what the plain formulas compute, with fewer passes and less memory."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graftwork import IA3Config, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from graftwork.fast import choose, plain_path
from graftwork.fast.bits import SIZE, Mask, pool
from graftwork.fast.choose import FOLLOWERS, STATE
from graftwork.fast.linear import Layers, Shrink, Work, finish
from graftwork.testing.bench import shake

WIDTH, ROWS, TOKENS = 32, 3, 5


class Attention(nn.Module):
    """Three layers that read one input, and one that reads theirs."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))
        self.w1, self.w3 = nn.Linear(WIDTH, 48, bias=bias), nn.Linear(WIDTH, 48, bias=bias)
        self.down = nn.Linear(48, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(self.q(x).tanh() * self.k(x).sigmoid() + self.v(x))
        out: Tensor = self.down(F.silu(self.w1(y)) * self.w3(y))
        return out + x


class Blocks(nn.Module):
    """Two of them, each checkpointed where that is asked for."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Attention(bias) for _ in range(2))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                again = torch.utils.checkpoint.checkpoint
                x = again(block, x, use_reentrant=self.reentrant)
        return x


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, TOKENS, WIDTH).to(dtype).requires_grad_()


def adapted(config: Any = None, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    config = config or LoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(Blocks(bias).to(dtype), config).train()
    shake(model, 0.05)
    return model


def step(model: Any, x: Tensor, seed: int = 2) -> tuple[Tensor, list[Tensor]]:
    """The output and all gradients, that of the input first."""
    torch.manual_seed(seed)
    y = model(x)
    every = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y, list(torch.autograd.grad(y.square().sum(), every))


def same(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance * 10, atol=tolerance)


class Operations(TorchDispatchMode):
    """The names and outputs of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.append((func.overloadpacket.__name__, out.detach()))
        return out

    def count(self, *names: str) -> int:
        return sum(name in names for name, _ in self.seen)


CONFIGS = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "rank 1": LoraConfig(r=1, lora_alpha=3, target_modules=["q", "v", "down"]),
    "ranks": LoraConfig(r=4, rank_pattern={"k": 2, "w3": 7}, target_modules="all-linear"),
    "bias": LoraConfig(r=4, lora_bias=True, target_modules="all-linear"),
    "biases": LoraConfig(r=4, bias="all", target_modules="all-linear"),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "vera": VeraConfig(r=4, target_modules=["q", "k", "v", "o"]),
    "ia3": IA3Config(target_modules=["q", "v", "down"], feedforward_modules=["down"]),
    "oft": OFTConfig(oft_block_size=8, target_modules=["q", "k", "down"]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_path_is_the_plain_one(name: str, bias: bool) -> None:
    model, x = adapted(copy.deepcopy(CONFIGS[name]), bias), inputs()
    with plain_path():
        want = step(model, x)
    first = step(model, x)
    same(first, want)
    assert all(map(torch.equal, first[1], step(model, x)[1]))
    with torch.no_grad():
        same(model(x), want[0])
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    assert (base - want[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft"])
def test_fifty_steps_end_where_the_plain_path_ends(name: str, dtype: torch.dtype) -> None:
    losses = []
    for context in (plain_path, nullcontext):
        model = adapted(copy.deepcopy(CONFIGS[name]), dtype=dtype)
        x, target = inputs(dtype).detach(), inputs(dtype).detach().flip(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        own = []
        for _ in range(50):
            with context():
                loss = (model(x).float() - target.float()).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            own.append(float(loss.detach()))
        losses.append(own)
    assert losses[0][-1] < losses[0][0]
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert max(abs(a - b) / max(a, 1) for a, b in zip(*losses, strict=True)) < bound


def test_several_adapters_are_one_sum() -> None:
    model, x = adapted(), inputs()
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=1, target_modules=["q", "k", "down"]))
    model.base_model.set_adapter(["default", "b"])
    shake(model, 0.05)
    with plain_path():
        want = step(model, x)
    same(step(model, x), want)
    same(step(model, x), want)


@pytest.fixture(autouse=True)
def sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers share what they can however few the rows are."""
    monkeypatch.setattr(choose, "FEW", 0)


def test_few_rows_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr(choose, "FEW", 8)
    for rows, names in ((7, []), (8, ["k", "v"])):
        model(torch.randn(1, 8, WIDTH))  # so that the names are known
        model.base_model.model.blocks[0].q(torch.randn(rows, WIDTH))
        left = [] if STATE.pending is None else STATE.pending.rest
        assert [host.path.rpartition(".")[2] for host, *_ in left] == names
        STATE.pending = None


@pytest.mark.fault("F5")
def test_layers_that_share_an_input_share_its_products() -> None:
    model, x = adapted(), inputs()
    step(model, x)
    hosts = model.base_model.hosts()
    after = {path: [one().path for one in FOLLOWERS[host]] for path, host in hosts.items()}
    assert after["blocks.0.q"] == ["blocks.0.k", "blocks.0.v"] and after["blocks.0.o"] == []
    assert after["blocks.1.k"] == ["blocks.1.v"] and after["blocks.1.w1"] == ["blocks.1.w3"]
    with Operations() as plain, plain_path():
        step(model, x)
    with Operations() as fast:
        step(model, x)
    # of a block: 7 layers, of which 4 lead; forward x A' of the leaders, s B' and x W' of all;
    # backward g B of all, g' s of all, the gradients of A and of the input of the leaders, g W
    assert fast.count("mm", "addmm", "addmm_") == 2 * (4 + 7 + 7 + 7 + 7 + 4 + 4 + 7)
    assert plain.count("mm", "addmm") == 2 * 7 * 8
    assert STATE.pending is None and STATE.last is None


@pytest.mark.fault("C7")
@pytest.mark.fault("C9")
def test_nothing_of_the_dense_update_is_made_and_little_is_kept() -> None:
    model, x = adapted(CONFIGS["dora"]), inputs()
    step(model, x)
    with Operations() as seen:
        step(model, x)
    weights = {(WIDTH, WIDTH), (48, WIDTH), (WIDTH, 48)}
    dense = [n for n, t in seen.seen if tuple(t.shape) in weights and n not in ("t", "detach")]
    assert dense == []


def saved(model: Any, x: Tensor) -> int:
    """How many numbers a forward keeps, but for parameters and the pool of bits: what the nodes of
    its graph hold.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, todo = {}, [model(x).grad_fn]
    for node in todo:
        if node is None:
            continue
        todo += [below for below, _ in node.next_functions if below not in todo]
        names = [name for name in dir(node) if name.startswith("_saved_")]
        kept = [getattr(node, name) for name in names] + list(getattr(node, "saved_tensors", ()))
        for t in kept:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
    return sum(n for n in found.values() if n < SIZE["cpu"])


@pytest.mark.fault("C7")
def test_dropout_keeps_nothing() -> None:
    without, x = adapted(), inputs()
    dropping = adapted(LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))
    for model in (without, dropping):
        step(model, x)
    assert saved(dropping, x) == saved(without, x)
    with plain_path():
        plain = saved(without, x)
    assert saved(without, x) < plain


def test_a_gated_input_is_multiplied_again() -> None:
    model, x = adapted(LoraConfig(r=4, target_modules=["down"])), inputs()
    names = []

    def walk(node: Any) -> None:
        if node is not None:
            names.append((node.name(), getattr(node, "saved_tensors", ())))
            for below, _ in node.next_functions:
                walk(below)

    walk(model(x).grad_fn)
    leaders = [kept for name, kept in names if name == "LayersBackward"]
    products = [n for n, _ in names if n == "MulBackward0"]
    assert leaders and products
    assert all([tuple(t.shape) for t in kept[-2:]] == [(ROWS, TOKENS, 48)] * 2 for kept in leaders)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_checkpointing_repeats_what_was_computed(reentrant: bool, rate: float) -> None:
    config = LoraConfig(r=4, lora_dropout=rate, target_modules="all-linear")
    model, x = adapted(config), inputs()
    step(model, x)
    want = step(model, x)
    again = adapted(config)
    again.base_model.model.reentrant = reentrant

    def backward(*outputs: Tensor) -> list[Tensor]:
        x.grad = None
        again.zero_grad()
        sum(y.square().sum() for y in outputs).backward()
        return [x.grad, *(p.grad for p in again.parameters() if p.requires_grad)]

    torch.manual_seed(2)
    first = again(x)
    torch.manual_seed(2)  # two forwards before the first backward
    double = backward(first, again(x))
    same(double, [2 * g for g in want[1]])
    for _ in range(2):
        torch.manual_seed(2)
        y = again(x)
        same((y, backward(y)), want)


def test_a_layer_that_is_left_out_changes_nothing_for_the_others() -> None:
    class Some(Attention):
        skip = False

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.q(x) if self.skip else self.q(x) + self.k(x) + self.v(x)
            return y

    base = Some()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q", "k", "v"])).train()
    shake(model, 0.05)
    x = inputs()
    for skip in (False, True, False, True):
        base.skip = skip
        x.grad = None
        model.zero_grad()
        model(x).square().sum().backward()
        got = [None if p.grad is None else p.grad.clone() for p in model.parameters()], x.grad
        x.grad = None
        model.zero_grad()
        with plain_path():
            model(x).square().sum().backward()
        for mine, p in zip(got[0], model.parameters(), strict=True):
            assert (mine is None) == (p.grad is None)
            if mine is not None:
                same(mine, p.grad)
        same(got[1], x.grad)


def test_an_input_that_was_changed_in_place_is_another_one() -> None:
    class Writes(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y: Tensor = self.q(x).detach()
            with torch.no_grad():
                x.mul_(2)
            return y + self.k(x)

    model = get_peft_model(Writes(), LoraConfig(r=4, target_modules=["q", "k"])).train()
    shake(model, 0.05)
    x = inputs()
    with plain_path():
        want = model(x)
    for _ in range(3):
        same(model(x), want)


@pytest.mark.fault("F8")
def test_threads_do_not_see_each_other() -> None:
    model, found = adapted(), {}
    x = [inputs() + i for i in range(4)]
    want = [step(model, one.detach().requires_grad_()) for one in x]

    def work(i: int) -> None:
        found[i] = [step(model, x[i].detach().requires_grad_()) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, runs in found.items():
        for one in runs:
            same(one, want[i])


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_the_gradient_of_the_gradient(rate: float) -> None:
    torch.manual_seed(0)
    x, w, bias = (torch.randn(*n, dtype=torch.float64) for n in ((5, 6), (4, 6), (4,)))
    a = [torch.randn(r, 6, dtype=torch.float64, requires_grad=True) for r in (2, 3)]
    b = [torch.randn(4, r, dtype=torch.float64, requires_grad=True) for r in (2, 3)]
    x, mask = x.requires_grad_(), Mask.draw(rate, x) if rate else None

    def both(x: Tensor, b0: Tensor, b1: Tensor, a0: Tensor, a1: Tensor) -> Tensor:
        work = Work(mask, (1.5, 0.5))
        y, again = Layers.apply(work, x, w, w, bias, None, b0, b1, a0, a1)
        finish(work, 1, x, again, w, None)
        low = Shrink.apply(mask, x, a0)
        return torch.cat([y.tanh() * again, low], 1)

    given = (x, *b, *a)
    assert torch.autograd.gradcheck(both, given)
    assert torch.autograd.gradgradcheck(both, given)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch itself
def test_transforms_and_compilers_see_plain_operations() -> None:
    model, x = adapted(), inputs().detach()
    want = model(x)
    assert "LayersBackward" in kinds(want)
    with plain_path():
        assert "LayersBackward" not in kinds(model(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(compiled(x), want)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().sum()

    got = torch.func.grad(loss)(params, x)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(x).square().sum(), [p for _, p in trained])
    same([got[n] for n, _ in trained], list(grads), 1e-4)
    with torch.no_grad():
        each = torch.func.vmap(lambda one: model(one))(x[:, None])
        same(each[:, 0], want)
        tangent = torch.randn_like(x)
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
            forward = torch.autograd.forward_ad.unpack_dual(dual).tangent
        small = (model(x + 1e-3 * tangent) - model(x - 1e-3 * tangent)) / 2e-3
        same(forward, small, 1e-2)


def kinds(y: Tensor) -> set[str]:
    """The kinds of nodes in a graph."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [below for below, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.fault("C6")
def test_autocast_computes_in_its_dtype_and_keeps_no_copy_of_weights() -> None:
    model, x = adapted(), inputs()
    with torch.autocast("cpu", torch.bfloat16), plain_path():
        want = step(model, x)
        plain = saved(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, x)
        assert saved(model, x) < plain
    assert got[0].dtype == want[0].dtype and "LayersBackward" in kinds(got[0])
    same(got[0], want[0], 0.05)
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.dtype == theirs.dtype and (mine - theirs).norm() < 0.05 * theirs.norm()


class Own(nn.Linear):
    """A layer with code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 1.0


def test_a_layer_with_its_own_code_runs_it_once() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(Own(WIDTH, WIDTH)), LoraConfig(r=4, target_modules=["0"]))
    shake(model.train(), 0.05)
    x = inputs()
    with plain_path():
        want = step(model, x)
    got = step(model, x)
    same(got, want)
    assert "ShrinkBackward" in kinds(got[0])
    assert model.adapters()[0].path == (
        "fast, after the layer's own product: a Own has a forward of its own"
    )


@pytest.mark.parametrize("kind", ["hook", "instance"])
def test_what_was_put_on_the_layer_still_runs(kind: str) -> None:
    model, x, seen = adapted(), inputs(), []
    layer = model.base_model.hosts()["blocks.0.q"].base_layer
    if kind == "hook":
        layer.register_forward_pre_hook(lambda *_: seen.append(1))
    else:  # as accelerate's hooks do
        own = layer.forward
        layer.forward = lambda x: (seen.append(1), own(x))[1]
    with plain_path():
        want = step(model, x)
    same(step(model, x), want)
    assert seen == [1, 1]


@pytest.mark.fault("H3")
def test_reports_say_which_path_is_taken_and_why() -> None:
    base = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(8, 8), nn.Linear(8, 8))
    base[2].weight.requires_grad_()
    model = PeftModel(base, LoraConfig(r=2, target_modules=["0", "1", "2"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["1"], use_dora=True))
    model.add_adapter("c", LoraConfig(r=8, target_modules=["1"]))
    paths = {(row.site, row.adapter): row.path for row in model.adapters()}
    assert paths["0", "a"] == "plain: the layer, Conv1d, is not linear"
    assert paths["1", "a"] == paths["1", "b"] == "fast"
    assert paths["1", "c"] == "plain: a dense update is cheaper at this rank"


def test_masks_are_windows_of_one_sequence() -> None:
    x = torch.ones(200, 300)
    torch.manual_seed(5)
    mask = Mask.draw(0.25, x)
    torch.manual_seed(5)
    assert mask == Mask.draw(0.25, x) != Mask.draw(0.25, x)
    kept = mask.times(x)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(float(kept.mean()) - 0.75) < 4 * (0.25 * 0.75 / x.numel()) ** 0.5
    same(mask.times_(x.clone()), kept)
    same(mask.add_(torch.ones_like(x), x), 1 + kept)
    assert pool(0.25, x.dtype, x.device, mask.size) is pool(0.25, x.dtype, x.device, mask.size)


def test_what_is_dropped_follows_from_the_seed() -> None:
    config = LoraConfig(r=4, lora_dropout=0.4, target_modules="all-linear")
    model, x = adapted(config), inputs()
    first = step(model, x)
    assert not torch.equal(first[0], step(model, x, seed=3)[0])
    same(step(model, x), first)
    injected = adapted(config).base_model.model
    same(step(injected, x), first)
    same(step(injected, x), first)
    with plain_path():
        same(step(model, x), first)
    assert not torch.equal(injected(x), injected(x))


def test_a_large_input_has_several_windows() -> None:
    x = torch.ones(3000, 1000)
    mask = Mask.draw(0.5, x)
    assert len(mask.starts) == 3 and mask.rows == 1048
    kept = mask.times(x)
    assert abs(float(kept.mean()) - 0.5) < 0.005
    same(mask.add_(torch.zeros_like(x), x), kept)
    assert not torch.equal(kept[:1048], kept[1048:2096])
    assert len(Mask.draw(0.5, torch.ones(0, 7)).starts) == 0


def test_dropout_scales_what_it_keeps() -> None:
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q"])
    torch.manual_seed(0)
    model = get_peft_model(Attention(), config).train()
    shake(model, 0.1)
    x = inputs().detach()
    q = model.base_model.model.q
    with torch.no_grad():
        mean = torch.stack([q(x) for _ in range(3000)]).mean(0)
        model.eval()
        whole = q(x)
        with model.disable_adapter():
            base = q(x)
    assert (mean - whole).abs().max() < 0.15 * (whole - base).abs().max()


@pytest.mark.fault("C13")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_sharded_model_learns_what_one_process_learns(kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, str(Path(__file__).parent / "fsdp_program.py")]
    both = [
        subprocess.Popen(
            [*program, str(rank), port, kind],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [one.splitlines()[-1] for one in told] == ["the same"] * 2, told


def test_a_copy_and_a_second_adapter_share_as_the_first() -> None:
    model, x = adapted(), inputs()
    want = step(model, x)
    again = copy.deepcopy(model)
    assert all(map(torch.equal, step(again, x)[1], want[1]))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["k", "v"]))
    assert all(map(torch.equal, step(model, x)[1], want[1]))
    model.set_adapter("b")
    shake(model, 0.05)
    with plain_path():
        other = step(model, x)
    same(step(model, x), other)


def test_cross_attention_shares_what_the_encoder_gives() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cross_attn = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in "qkv"})

        def forward(self, x: Tensor) -> Tensor:
            at, y = self.cross_attn, x.flip(0)
            out: Tensor = at["q"](x) * at["k"](y) + at["v"](y)
            return out

    model = get_peft_model(Decoder(), LoraConfig(r=4, target_modules=["q", "k", "v"])).train()
    shake(model, 0.05)
    x = inputs()
    with plain_path():
        want = step(model, x)
    same(step(model, x), want)
    hosts = model.base_model.hosts()
    after = {path: [one().path for one in FOLLOWERS[host]] for path, host in hosts.items()}
    assert after["cross_attn.q"] == [] and after["cross_attn.k"] == ["cross_attn.v"]


def test_outputs_may_be_written_to_in_place() -> None:
    class Writes(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            out: Tensor = self.o(q.mul_(2).add_(k.neg_()) + v.mul_(0.5))
            return out

    model = get_peft_model(Writes(), LoraConfig(r=4, target_modules=["q", "k", "v", "o"])).train()
    shake(model, 0.05)
    x = inputs()
    with plain_path():
        want = step(model, x)
    same(step(model, x), want)


@pytest.mark.parametrize("frozen", ["q", "k"])
def test_a_layer_that_records_nothing_takes_nothing_from_one_that_does(frozen: str) -> None:
    class Halted(Attention):
        def forward(self, x: Tensor) -> Tensor:
            found = []
            for name in ("q", "k"):
                with torch.set_grad_enabled(name != frozen):
                    found.append(self.get_submodule(name)(x))
            assert [y.requires_grad for y in found] == [frozen != "q", frozen != "k"]
            y: Tensor = found[0] * found[1]
            return y

    model = get_peft_model(Halted(), LoraConfig(r=4, target_modules=["q", "k"])).train()
    shake(model, 0.05)
    x, found = inputs(), []
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    root = model.eval().base_model  # in training it would be refused
    choose.link(root.switch, root.hosts)
    for context in (plain_path, nullcontext):
        with context():
            y = root.model(x).square().sum()
        found.append(torch.autograd.grad(y, list(trained.values()), allow_unused=True))
    for name, want, got in zip(trained, *found, strict=True):
        assert (want is None) == (got is None) == (f".{frozen}." in name)
        same(got, want)


class Quantised(nn.Linear):
    """A layer whose product only its own code can compute."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("own", ["q", "k", "v", "qk"])
def test_layers_that_compute_by_themselves_are_apart_from_the_others(own: str) -> None:
    model, x = adapted(bias=True), inputs()
    for host in model.base_model.hosts().values():
        if host.path.rpartition(".")[2] in list(own):
            host.base_layer.__class__ = Quantised
    with plain_path():
        want = step(model, x)
    same(step(model, x), want)
    with torch.no_grad():
        same(model(x), want[0])


@pytest.mark.parametrize("alpha", [4, 6])
@pytest.mark.parametrize("double", [(), ("k", "down")])
def test_master_copies_learn_in_their_dtype(alpha: int, double: Any) -> None:
    model = adapted(LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear"))
    x = inputs()
    for name, p in model.named_parameters():
        if p.requires_grad and (not double or any(f".{n}." in name for n in double)):
            p.data = p.data.double()
    with plain_path():
        want = step(model, x)
    got = step(model, x)
    same(got, want)
    assert [g.dtype for g in got[1]] == [g.dtype for g in want[1]]
    assert any(g.dtype is torch.float64 for g in got[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["lora", "ranks", "bias", "dora", "vera"])
def test_many_rows_are_multiplied_by_the_sum_where_nothing_is_recorded(
    name: str, bias: bool
) -> None:
    model = adapted(copy.deepcopy(CONFIGS[name]), bias).eval()
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=3, target_modules=["q", "k", "down"]))
    shake(model, 0.05)
    most = max(WIDTH, 2 * 32 * 48 // (32 + 48) + 1)  # from this many rows on at all layers
    for names in (["default"], ["default", "b"]):
        model.base_model.set_adapter(names)
        for rows, few in ((most, False), (WIDTH // 2, True)):
            x = torch.randn(rows, 1, WIDTH)
            with plain_path(), torch.no_grad():
                want = model(x)
            with Operations() as seen, torch.no_grad():
                same(model(x), want)
            thin = [t for n, t in seen.seen if n == "mm" and min(t.shape) <= 21]
            assert bool(thin) == few or name in ("dora", "vera")
            recorded = model(x)
            same(recorded, want)
            assert "LayersBackward" in kinds(recorded)


def test_what_is_not_recorded_in_training_has_the_bits_of_what_is() -> None:
    model, x = adapted(), torch.randn(64, 1, WIDTH)  # as checkpointing needs it, which repeats it
    with torch.no_grad():
        y = model(x)
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_not_added_to_weights_that_would_round_them_away(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype).eval()
    with Operations() as seen, torch.no_grad():
        model(torch.randn(64, 1, WIDTH, dtype=dtype))
    weights = {(WIDTH, WIDTH), (48, WIDTH), (WIDTH, 48)}
    dense = [n for n, t in seen.seen if tuple(t.shape) in weights and n not in ("t", "detach")]
    assert dense == (["addmm"] * 14 if dtype is torch.float32 else [])


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@GPU
@pytest.mark.parametrize(
    ("dtype", "rate"), [(torch.float32, 0.0), (torch.float32, 0.4), (torch.bfloat16, 0.0)]
)
@pytest.mark.parametrize("name", ["lora", "ranks", "bias", "dora"])
def test_a_gpu_computes_the_same(name: str, dtype: torch.dtype, rate: float) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config.lora_dropout, config.lora_alpha = rate, 6
    model = adapted(config, dtype=dtype).cuda()
    x = inputs(dtype).detach().cuda().requires_grad_()
    with plain_path():
        want = step(model, x)
    got = step(model, x)
    assert [g.dtype for g in got[1]] == [g.dtype for g in want[1]]
    same(got, want, 1e-4 if dtype == torch.float32 else 0.05)
