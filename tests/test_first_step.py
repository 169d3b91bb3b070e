"""The first training step is watched, in any loop: what has no effect is an error, and no alarm is
false.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftwork as g
from graftwork import LoraConfig, TrainingError, get_peft_model
from graftwork.errors import POLICY, Policy
from graftwork.model.canary import Canary
from graftwork.model.step import Unused
from graftwork.testing.entry import IDS as SMALL
from specs import ROWS
from tiny import IDS, MODELS, build


class Block(nn.Module):
    """Layers that are used in ways of their own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.on, self.more = how, nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts[self.chosen](self.on(x))
        if self.how == "reads":
            return y + F.linear(x, self.more.weight)
        if self.how == "leaves out":
            return y
        more = self.more(x)
        if self.how == "detaches":
            return y + more.detach()
        if self.how == "overflows":
            return y + (more - more) / (more - more)
        return y + 0 * more if self.how == "zeroes" else y + more


EVERY = r"0\.(on|more|experts\.\d)|1"


def net(how: str = "", targets: str = EVERY, **options: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(Block(how), nn.Linear(8, 3))
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets, **options)).train()


def sgd(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> list[Any]:
    """All hooks in front of and after modules, and on tensors."""
    found: list[Any] = []
    for module in model.modules():
        found += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return found + [h for p in model.parameters() for h in (p._backward_hooks or {}).values()]


@pytest.mark.fault("B5")
@pytest.mark.fault("J1")
def test_a_layer_that_is_read_and_not_called_stops_the_first_forward() -> None:
    model = net("reads")
    for _ in range(2):  # and the next one, if somebody goes on
        with pytest.raises(
            TrainingError, match=r"adapter at 0.more has no effect: Block, .*target_"
        ):
            model(X)
    assert [type(h) for h in hooks(model)] == [Canary]
    assert model.eval()(X).shape == (4, 3)


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("detaches", "what trains here gets no gradient: 0.more: default.lora.A, 0.more: default"),
        ("overflows", "gets a gradient that is not finite: "),
    ],
)
def test_gradients_that_do_not_arrive_stop_the_first_backward(how: str, text: str) -> None:
    model = net(how)
    for _ in range(2):
        loss = model(X).sum()
        with pytest.raises(TrainingError, match=text):
            loss.backward()
        assert [type(h) for h in hooks(model)] == [Canary]
    with pytest.raises(TrainingError, match=text):  # whichever way gradients are asked for
        torch.autograd.grad(model(X).sum(), [p for p in model.parameters() if p.requires_grad],
                            allow_unused=True)  # fmt: skip


@pytest.mark.fault("C1")
def test_a_model_that_computes_without_gradients_stops() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.inner(x)

    model = get_peft_model(Frozen(), LoraConfig(r=2, target_modules=["inner"])).train()
    with pytest.raises(TrainingError, match=r"no gradient reaches the adapters: .*detach\(\)"):
        model(X)
    with torch.no_grad():
        model(X)


def test_overflowing_gradients_are_the_scalers_business_in_half_precision() -> None:
    model = net("overflows")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(X).sum()
    loss.backward()
    assert any(not p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.fault("C1")
def test_after_the_first_step_nothing_is_left_and_the_bits_are_the_same() -> None:
    def trained(effect: str) -> tuple[list[Tensor], Any]:
        POLICY.effect = effect
        try:
            model = net(targets=r"0\.(on|more|experts\.0)|1", lora_dropout=0.1)
            optimizer = sgd(model)
            torch.manual_seed(3)
            for _ in range(3):
                model(X).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                assert not hooks(model)
            return [p.detach() for p in model.parameters()], model
        finally:
            POLICY.effect = "error"

    (watched, model), (alone, _) = trained("error"), trained("off")
    assert all(map(torch.equal, watched, alone))
    model.add_adapter("b", LoraConfig(r=2, target_modules="1"))
    assert not hooks(model)  # it does not train yet
    model.set_adapter("b")
    assert [type(h) for h in hooks(model)] == [Canary]
    model(X).sum().backward()
    sgd(model).step()
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        assert not hooks(model), "each adapter is watched once"


def test_what_a_step_does_not_need_waits_and_is_told() -> None:
    model = net()
    optimizer = sgd(model)
    assert model.unused_sites() == []
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
    assert model.unused_sites() == ["0.experts.1"]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.unused_sites() == ["0.experts.1"]
    model.get_base_model()[0].chosen = 1
    with torch.no_grad():
        model.eval()(X)
    assert model.unused_sites() == ["0.experts.1"]  # that was no training
    model.train()(X)
    assert model.unused_sites() == [] and not hooks(model)
    assert twin.unused_sites() == ["0.experts.1"]
    twin.unload()
    assert not hooks(twin)


def test_a_layer_that_its_module_left_out_is_a_warning() -> None:
    model = net("leaves out")
    model(X).sum().backward()
    with pytest.warns(UserWarning, match=r"the adapter at 0.more did nothing .*unused_sites"):
        sgd(model).step()
    assert model.unused_sites() == ["0.more", "0.experts.1"]


class Parts(nn.Module):
    """Two outputs, of which a loss may take one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def test_a_loss_of_some_outputs_is_a_warning_and_of_others_later_none() -> None:
    model = get_peft_model(Parts(), LoraConfig(r=2, target_modules=["a", "b"])).train()
    model(X)[0].sum().backward()
    with pytest.warns(UserWarning, match=r"no gradient from this loss.*: b: default.lora.A, b: d"):
        sgd(model).step()
    model = get_peft_model(Parts(), LoraConfig(r=2, target_modules=["a", "b"])).train()
    for i in (0, 1):  # accumulated: each micro batch has a loss of its own
        model(X)[i].sum().backward()
    sgd(model).step()
    assert not hooks(model)


def test_zeros_in_two_steps_are_a_warning_and_zeros_everywhere_are_none() -> None:
    model = net("zeroes")
    optimizer = sgd(model)
    model(X).sum().backward()
    optimizer.step()
    model(X).sum().backward()
    with pytest.warns(UserWarning, match=r"gradient of zeros alone in two steps: 0.more\."):
        optimizer.step()
    model = net()
    optimizer = sgd(model)
    for _ in range(3):  # as where all rewards of a group are the same
        (0 * model(X).sum()).backward()
        optimizer.step()


def test_several_forwards_may_come_before_a_backward() -> None:
    model = net()
    block = model.get_base_model()[0]
    first = model(X)
    block.chosen = 1
    second = model(X + 1)
    (first - second).square().sum().backward()
    sgd(model).step()
    assert not model.unused_sites() and not hooks(model)


@pytest.mark.fault("C1")
def test_programs_of_peft_are_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICY, "lenient", True)
    model = net("reads")
    with pytest.warns(UserWarning, match="adapter at 0.more has no effect"):
        model(X).sum().backward()
    sgd(model).step()
    assert model.unused_sites() == ["0.more", "0.experts.1"]
    model = net("detaches")
    with pytest.warns(UserWarning, match="what trains here gets no gradient: 0.more"):
        model(X).sum().backward()


def test_it_can_be_a_warning_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICY, "effect", "off")
    model = net("reads")
    assert not hooks(model)
    model(X).sum().backward()
    monkeypatch.setenv("GRAFTWORK_EFFECT", "warn")
    assert not Policy().raises() and Policy().effect == "warn"
    monkeypatch.setenv("GRAFTWORK_EFFECT", "loud")
    with pytest.raises(ValueError, match="GRAFTWORK_EFFECT='loud' is none of error, warn and off"):
        Policy()


def test_models_without_a_wrapper_are_watched_too() -> None:
    base = nn.Sequential(Block("reads"), nn.Linear(8, 3))
    g.inject_adapter_in_model(LoraConfig(r=2, target_modules=["more"]), base)
    with pytest.raises(TrainingError, match=r"0\.more has no effect"):
        base.train()(X)
    base[0].how = ""
    base(X).sum().backward()
    sgd(base).step()
    assert not hooks(base)


@pytest.mark.fault("F6")
def test_compiled_training_is_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = net(targets=r"0\.(on|more|experts\.0)|1")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = sgd(model)
    for _ in range(3):
        compiled(X).sum().backward()
        optimizer.step()
    assert counter.frame_count == 1
    blockwise = net(targets=r"0\.(on|more|experts\.0)|1")
    blockwise.get_base_model()[0].compile(backend=counter)
    optimizer, counter.frame_count = sgd(blockwise), 0
    for _ in range(3):
        blockwise(X).sum().backward()
        optimizer.step()
    assert counter.frame_count == 1 and not hooks(blockwise)


@pytest.mark.parametrize("row", ROWS)
def test_no_method_gives_a_false_alarm(row: str) -> None:
    entry = ROWS[row]
    model = entry.small().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        assert row == "Arrow"  # which is made of adapters that others have trained
        return
    optimizer = torch.optim.SGD(trained, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            y = model(SMALL, **entry.call)
            (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    base = model.get_base_model()
    assert model.unused_sites() == [] and set(model.base_model.switch.proven) == {"a0"}
    assert not any(isinstance(h, (Canary, Unused)) for h in hooks(base))


FAMILIES = ["llama", "llama_tied", "gpt2", "bert", "t5", "vit", "mixtral", "attention"]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_gives_a_false_alarm(name: str) -> None:
    base = build(name)
    targets = ["mha", "lin"] if name == "attention" else None
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets)).train()
    optimizer = sgd(model)
    for _ in range(2):
        y = model(**MODELS[name][1])
        (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not model.unused_sites() and not hooks(model)


@pytest.mark.fault("C1")
def test_distributed_and_accelerated_loops(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    try:
        model = net("detaches")
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with pytest.raises(TrainingError, match=r"gets no gradient: 0\.more"):
            wrapped(X).sum().backward()
        wrapped = nn.parallel.DistributedDataParallel(net(targets=r"0\.(on|more)|1"))
        wrapped(X).sum().backward()
        sgd(wrapped).step()
        assert wrapped.module.base_model.switch.proven
    finally:
        dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A language model's files."""
    build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers reports what it loads."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


HEAD = r"score of this LlamaForSequenceClassification is not in the checkpoint .*\['score'\]"


@pytest.mark.fault("A8")
def test_a_new_head_that_nobody_trains_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForSequenceClassification

    def model(**options: Any) -> Any:
        base: Any = LlamaForSequenceClassification.from_pretrained(folder, pad_token_id=0)
        config = LoraConfig(r=2, target_modules=["q_proj"], **options)
        return get_peft_model(base, config).train()

    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    with pytest.raises(TrainingError, match=HEAD):
        model()(**batch)
    for one in (model(task_type="SEQ_CLS"), model(modules_to_save=["score"])):
        one(**batch).loss.backward()
    by_hand = model()
    by_hand.get_base_model().score.requires_grad_(True)
    by_hand(**batch).loss.backward()
    with torch.no_grad():
        model()(**batch)
    monkeypatch.setattr(POLICY, "lenient", True)
    with pytest.warns(UserWarning, match=HEAD):
        model()(**batch).loss.backward()


@pytest.mark.fault("A8")
def test_heads_that_are_known_or_were_resized_are_none(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    loaded: Any = LlamaForCausalLM.from_pretrained(folder)
    loaded.resize_token_embeddings(70, mean_resizing=False)
    for base in (loaded, LlamaForCausalLM.from_pretrained(folder), build("llama")):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).train()
        model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.fault("L6")
def test_running_statistics_of_a_frozen_model_are_told() -> None:
    def model(**options: Any) -> Any:
        base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        return get_peft_model(base, LoraConfig(r=2, target_modules=["0"], **options)).train()

    with pytest.warns(UserWarning, match=r"1, a BatchNorm1d, changes its running statistics"):
        model()(X)
    model(modules_to_save=["1"])(X)
    quiet = model()
    quiet.get_base_model()[1].eval()
    quiet(X)
