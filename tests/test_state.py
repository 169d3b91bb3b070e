"""Adapters come, go, change their names and their state; reports tell the truth about it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftwork import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    MergeError,
    PeftModel,
    StateError,
    TrainingError,
    get_peft_model,
)
from graftwork.testing.bench import shake
from tiny import IDS, build, run


def adapted(*methods: Any) -> Any:
    model = get_peft_model(build("llama"), methods[0] if methods else LoraConfig(r=4), "a").eval()
    for name, config in zip("bcd", methods[1:], strict=False):
        model.add_adapter(name, config)
    return model


def test_names_that_cannot_be() -> None:
    for name in ("a.b", "", "__base__"):
        with pytest.raises(StateError, match="cannot be an adapter's name"):
            get_peft_model(build("llama"), LoraConfig(), name)
    model = adapted()
    with pytest.raises(StateError, match="there is an adapter 'a' already"):
        model.add_adapter("a", LoraConfig())
    with pytest.raises(
        StateError, match=r"no adapter 'aa'; this model has \['a'\]; did you mean 'a'"
    ):
        model.set_adapter("aa")
    for call in (
        lambda: model.delete_adapter("x"),
        lambda: model.set_requires_grad("x"),
        lambda: model.merge_adapter(["x"]),
        lambda: model.rename_adapter("x", "y"),
        lambda: model.using("x").__enter__(),
        lambda: model(input_ids=IDS, adapter_names=["a", "x"]),
        lambda: model.generate(input_ids=IDS, adapter_names=["a", "x"]),
    ):
        with pytest.raises(StateError, match="no adapter 'x'"):
            call()
    with pytest.raises(StateError, match="has 3 entries for a batch of 2 rows"):
        model(input_ids=IDS, adapter_names=["a"] * 3)
    with pytest.raises(StateError, match="has 1 entries for a batch of 2 rows"):
        model(input_ids=IDS, adapter_names=["a"])


@pytest.mark.fault("A9")
@pytest.mark.fault("A10")
def test_a_second_wrapping_is_refused() -> None:
    model = adapted()
    for again in (model, model.get_base_model()):
        with pytest.raises(StateError, match=r"already has the adapters \['a'\].*add_adapter"):
            get_peft_model(again, LoraConfig())
    with pytest.raises(TypeError, match="does not say which layers"):
        from graftwork import PeftConfig

        get_peft_model(build("llama"), PeftConfig())


@pytest.mark.fault("C2")
def test_only_the_active_adapter_is_trainable_and_adding_changes_nothing() -> None:
    model = adapted(LoraConfig(r=4), IA3Config(), LoraConfig(r=2, inference_mode=True))

    def trainable() -> set[str]:
        return {
            n.split(".adapters.")[1].split(".")[0]
            for n, p in model.named_parameters()
            if p.requires_grad
        }

    assert model.active_adapters == ["a"] and trainable() == {"a"}
    model.set_adapter("b")
    assert model.active_adapter == "b" and trainable() == {"b"}
    model.set_adapter(["a", "b"])
    assert trainable() == {"a", "b"}
    model.set_requires_grad("c")
    with model.disable_adapter():
        assert trainable() == {"a", "b", "c"}
    model.set_adapter("a", inference_mode=True)
    assert trainable() == set()


@pytest.mark.fault("C2")
def test_scopes_end_where_they_should() -> None:
    model = adapted(LoraConfig(r=4), LoraConfig(r=2))
    shake(model)
    model.set_adapter("b")
    shake(model, seed=2)
    model.set_adapter("a")
    want = run(model, "llama")
    with pytest.raises(RuntimeError), model.using("b"):
        assert not torch.equal(run(model, "llama"), want)
        with model.disable_adapter():
            base = run(model, "llama")
        raise RuntimeError
    assert torch.equal(run(model, "llama"), want)
    model.disable_adapter_layers()
    assert torch.equal(run(model, "llama"), base) and not model.has_active_enabled_adapter
    model.enable_adapter_layers()
    assert torch.equal(run(model, "llama"), want)


@pytest.mark.fault("C3")
def test_deleting_and_renaming() -> None:
    model = adapted(LoraConfig(r=4), IA3Config(), LoraConfig(r=2, modules_to_save=["lm_head"]))
    shake(model)
    want = run(model, "llama")
    model.rename_adapter("a", "z")
    assert torch.equal(run(model, "llama"), want) and list(model.peft_config) == ["z", "b", "c"]
    model.merge_adapter(["z", "b"])
    model.rename_adapter("b", "y")
    assert model.get_model_status().merged_adapters == ["y", "z"]
    model.unmerge_adapter()
    model.rename_adapter("y", "b")
    assert torch.equal(run(model, "llama"), want) and model.active_adapters == ["z"]
    hosts = len(model.base_model.hosts())
    model.delete_adapter("b")
    assert len(model.base_model.hosts()) < hosts, "layers without an adapter get their place back"
    with pytest.warns(UserWarning, match="'z' was deleted; 'c' is active now"):
        model.delete_adapter("z")
    assert model.active_adapters == ["c"]
    assert all(p.requires_grad for n, p in model.named_parameters() if ".adapters.c." in n)
    model.delete_adapter("c")
    assert torch.equal(run(model, "llama"), run(build("llama"), "llama"))
    model.add_adapter("new", LoraConfig(r=4))
    assert model.active_adapters == ["new"]
    assert {n for n, _ in model.unload().named_modules()} == {
        n for n, _ in build("llama").named_modules()
    }


@pytest.mark.fault("A10")
@pytest.mark.fault("C3")
def test_coming_and_going_leaves_nothing_behind() -> None:
    model = adapted()

    def tensors() -> list[torch.Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]

    def come_and_go() -> None:
        for config in (LoraConfig(r=2), IA3Config(), AdaLoraConfig(total_step=5)):
            model.add_adapter("x", config)
            model.delete_adapter("x")

    come_and_go()
    before = tensors()  # held, so that no new tensor can have the id of one of them
    known, size = {id(t) for t in before}, len(model.state_dict())
    for _ in range(20):
        come_and_go()
    assert not [t.shape for t in tensors() if id(t) not in known]
    assert len(model.state_dict()) == size


@pytest.mark.fault("D4")
def test_merging_is_whole_or_not_at_all() -> None:
    model = adapted(LoraConfig(r=4, target_modules="all-linear"), IA3Config())
    shake(model)
    want, before = run(model, "llama"), {n: t.clone() for n, t in model.state_dict().items()}
    last = list(model.base_model.hosts().values())[-1]
    with torch.no_grad():
        last.parts(("a",))[0].B[0, 0] = torch.nan
    with pytest.raises(MergeError, match=r"not finite in torch.float32; nothing was changed"):
        model.merge_adapter()
    for keep in (False, "cpu"):
        with pytest.raises(MergeError):
            model.merge_adapter(keep=keep)
    with pytest.raises(MergeError):
        model.merge_and_unload()
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items() if "adapters" not in n)
    assert not any(host.merged_adapters for host in model.base_model.hosts().values())
    with torch.no_grad():
        last.parts(("a",))[0].B[0, 0] = before[[n for n in before if n.endswith("lora.B")][-1]][
            0, 0
        ]
    torch.testing.assert_close(run(model, "llama"), want)


@pytest.mark.parametrize("keep", [True, "cpu", False])
def test_merge_unmerge_and_what_is_allowed_meanwhile(keep: Any) -> None:
    model = adapted(LoraConfig(r=4, target_modules="all-linear"), IA3Config())
    shake(model)
    model.set_adapter("b")
    shake(model, seed=2)
    model.set_adapter("a")
    want = run(model, "llama")
    with model.using("b"):
        other = run(model, "llama")
    with pytest.warns(UserWarning, match="no adapter is merged"):
        model.unmerge_adapter()
    model.merge_adapter(["b"], keep=keep)
    torch.testing.assert_close(run(model, "llama"), other, rtol=1e-4, atol=1e-5)
    assert model.active_adapters == ["b"]
    with pytest.warns(UserWarning, match=r"\['b'\] are merged already"):
        model.merge_adapter(["b"])
    with pytest.raises(StateError, match="unmerge_adapter"):
        model.add_adapter("x", LoraConfig())
    with pytest.raises(StateError, match="'b' is merged into"):
        model.delete_adapter("b")
    if keep is False:
        with pytest.raises(StateError, match="keep=False"), model.using("a"):
            run(model, "llama")
        with pytest.raises(StateError, match="nothing can be undone"):
            model.unmerge_adapter()
        return
    with model.using("a"):
        torch.testing.assert_close(run(model, "llama"), want)
    model.merge_adapter(["a"])
    both = run(model, "llama")
    model.unmerge_adapter()
    assert torch.equal(run(model, "llama"), want) and model.active_adapters == ["a"]
    with model.using("b", "a"):
        torch.testing.assert_close(run(model, "llama"), both, rtol=1e-4, atol=1e-5)


@pytest.mark.fault("D3")
def test_a_thousand_merges_leave_every_bit() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)).bfloat16(), LoraConfig(r=4, target_modules=["0"])
    )
    shake(model)
    before = model.base_model.model[0].base_layer.weight.clone()
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


def test_a_merged_model_runs_in_training_mode_too() -> None:
    model = adapted(LoraConfig(r=4)).train()
    model.merge_adapter()
    assert not model(input_ids=IDS).logits.requires_grad
    model.unmerge_adapter()
    assert model(input_ids=IDS).logits.requires_grad


def test_a_merged_model_can_be_moved_before_it_is_unmerged() -> None:
    model = adapted()
    shake(model)
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    want = get_peft_model(build("llama"), LoraConfig(r=4)).get_base_model().state_dict()
    got = model.get_base_model().state_dict()
    assert all(torch.equal(got[n].float(), t) for n, t in want.items() if "adapters" not in n)


@pytest.mark.fault("J1")
def test_reports(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"), IA3Config())
    shake(model)
    table = str(model.adapters())
    lines = table.splitlines()
    assert (
        lines[0].split()
        == "site layer adapter method rank scale dtype device state change path".split()
    )
    assert "q_proj x2" in table and "Linear(32, 32)" in table and "active trainable" in table
    rows = model.adapters().to_dict()
    first = next(r for r in rows if r["adapter"] == "a")
    host = model.base_model.hosts()[first["site"]]
    delta = host.parts(("a",))[0].delta().detach()
    assert first["change"] == pytest.approx(
        float(delta.norm() / host.base_layer.weight.norm()), rel=1e-4
    )
    assert (first["rank"], first["scale"], first["active"], first["merged"]) == (
        4,
        1.5,
        True,
        False,
    )
    model.merge_adapter()
    assert all(r.merged == (r.adapter == "a") for r in model.adapters())
    status = model.get_model_status()
    assert status.merged_adapters == ["a"] and status.available_adapters == ["a", "b"]
    assert status.requires_grad == {"a": True, "b": False} and status.num_adapter_layers == 14
    layer = model.get_layer_status()[0]
    assert layer.name.startswith("model.model.layers.0") and layer.merged_adapters == ["a"]
    model.unmerge_adapter()
    model.print_trainable_parameters()
    trainable, every = model.get_nb_trainable_parameters()
    out = f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: "
    assert capsys.readouterr().out.startswith(out)


@pytest.mark.fault("J2")
def test_counts_are_right_for_tied_shared_and_meta_tensors() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        big = LlamaForCausalLM(LlamaConfig())
    model = get_peft_model(big, LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters() == (12_582_912, 6_750_998_528)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    base = build("llama_tied")
    numbers = sum(p.numel() for p in base.parameters())
    tied = get_peft_model(base, LoraConfig(r=4))
    trainable, every = tied.get_nb_trainable_parameters()
    assert every - trainable == numbers
    linear = nn.Linear(8, 8, bias=False)
    twin = nn.Linear(8, 8, bias=False)
    twin.weight = nn.Parameter(linear.weight.data)  # another parameter of the same storage
    model = get_peft_model(nn.Sequential(linear, twin), LoraConfig(r=2, target_modules=["0"]))
    assert model.get_nb_trainable_parameters() == (32, 96)


@pytest.mark.fault("J2")
@pytest.mark.fault("D7")
@pytest.mark.fault("H2")
def test_four_bit_weights_count_twice_and_are_not_read_by_lora() -> None:
    class Params4bit(nn.Parameter):
        """A packed weight, as bitsandbytes has."""

    class Linear4bit(nn.Linear):
        def __init__(self, in_: int, out: int) -> None:
            super().__init__(in_, out)
            packed = torch.zeros(in_ * out // 2, 1, dtype=torch.uint8)
            self.weight = Params4bit(packed, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(*x.shape[:-1], self.out_features)

    model = get_peft_model(nn.Sequential(Linear4bit(8, 6)), LoraConfig(r=2, target_modules=["0"]))
    assert model.get_nb_trainable_parameters() == (28, 28 + 48 + 6)
    shake(model)
    assert model(torch.randn(3, 8)).abs().sum() > 0
    with pytest.raises(TypeError, match=r"packed weight \(Params4bit.*DENSE\['Params4bit'\]"):
        model.merge_adapter()
    from graftwork.engine.dense import DENSE

    DENSE["Params4bit"] = lambda w: torch.ones(6, 8)
    try:
        dora = LoraConfig(r=2, use_dora=True, target_modules=["0"])
        get_peft_model(nn.Sequential(Linear4bit(8, 6)), dora)(torch.randn(3, 8))
    finally:
        del DENSE["Params4bit"]


@pytest.mark.fault("C10")
def test_a_schedule_follows_any_torch_optimizer_and_nothing_else() -> None:
    def train(model: Any, step: Any, n: int = 8) -> Any:
        for _ in range(n):
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            step()
        return model.peft_config["a"].rank_pattern

    config = AdaLoraConfig(init_r=4, target_r=2, total_step=8)
    model = adapted(config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    pattern = train(model, torch.optim.AdamW(parameters, lr=1e-2).step)
    assert sum(map(sum, pattern.values())) == 8, "the budget is reached"
    assert config.rank_pattern is None, "the user's own config is not written to"

    by_hand = adapted(config).train()
    parameters = [p for p in by_hand.parameters() if p.requires_grad]

    def step() -> None:
        with torch.no_grad():
            for p in parameters:
                p -= 0.01 * p.grad

    with pytest.raises(TrainingError, match="no step of a torch optimizer"):
        train(by_hand, step)

    other = adapted(config).train()
    unrelated = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(unrelated.parameters(), lr=0.1)
    unrelated(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert other.base_model.switch.schedules["a"].step == 0


def test_the_penalty_counts_whatever_becomes_of_the_loss() -> None:
    def gradient(use_loss: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = adapted(AdaLoraConfig(init_r=4, target_r=2, total_step=8, orth_reg_weight=2.0))
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        out = model(input_ids=IDS, labels=IDS)
        loss = out.loss
        if not use_loss:  # a program that computes its own
            logits = out.logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return next(p.grad for n, p in model.named_parameters() if n.endswith("adalora.A"))

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_resumed_schedule_goes_on_where_it_was(tmp_path: Path) -> None:
    def steps(model: Any, optimizer: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()

    def new() -> Any:
        torch.manual_seed(0)
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=12, tinit=2, tfinal=2)
        return get_peft_model(build("llama"), config).train()

    def sgd(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    whole = new()
    steps(whole, sgd(whole), 12)
    half = new()
    steps(half, sgd(half), 6)
    half.save_pretrained(tmp_path)
    for resumed in (
        PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).train(),
        new(),
    ):
        if resumed.base_model.switch.schedules["default"].step == 0:
            resumed.load_adapter(tmp_path, "default", is_trainable=True)
            resumed.train()
        steps(resumed, sgd(resumed), 6)
        assert (
            resumed.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
        )
        mine, theirs = resumed.state_dict(), whole.state_dict()
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
