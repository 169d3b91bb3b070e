"""``assert_effective``: what takes effect passes and is told; what does not is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftwork as g
from graftwork import LoraConfig, StateError, TrainingError, get_peft_model
from graftwork.testing.bench import shake
from tiny import build

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=2, use_dora=True, **QV),
    "saved": lambda: LoraConfig(r=2, modules_to_save=["lm_head"], **QV),
    "tokens": lambda: g.TrainableTokensConfig(token_indices=[3, 5]),
    "adalora": lambda: g.AdaLoraConfig(init_r=2, total_step=9, **QV),
    "ia3": lambda: g.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
    "vera": lambda: g.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "loha": lambda: g.LoHaConfig(r=2, **QV),
    "lokr": lambda: g.LoKrConfig(r=2, **QV),
    "oft": lambda: g.OFTConfig(r=0, oft_block_size=4, **QV),
    "boft": lambda: g.BOFTConfig(boft_block_size=4, **QV),
    "hra": lambda: g.HRAConfig(r=2, **QV),
    "fourierft": lambda: g.FourierFTConfig(n_frequency=9, **QV),
    "miss": lambda: g.MissConfig(r=2, **QV),
    "norms": lambda: g.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt": lambda: g.PromptTuningConfig(num_virtual_tokens=2, **LM),
    "p-tuning": lambda: g.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **LM),
    "prefix": lambda: g.PrefixTuningConfig(num_virtual_tokens=2, **LM),
    "adaption": lambda: g.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **LM),
}
IDS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.fault("J1")
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_methods_pass_as_they_begin_and_nothing_is_changed(name: str, labels: bool) -> None:
    model = get_peft_model(build("llama"), METHODS[name]()).train()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    batch = {"input_ids": IDS, **({"labels": IDS} if labels else {})}
    found = model.assert_effective(batch)
    assert found.trained and found.reached and not found.waiting
    assert str(found).startswith(
        f"{len(found.reached)} adapted layers ran; {found.trained} tensors"
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [m.training for m in model.modules()]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 1 and torch.equal(grads[0], torch.ones_like(first))
    assert not any(m._forward_pre_hooks for m in model.base_model.hosts().values())
    shake(model, seed=1)
    assert model.assert_effective(batch).change > 0


class Block(nn.Module):
    """Layers that are used in ways of their own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.on, self.more = how, nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts[0](self.on(x))
        if self.how == "reads":
            return y + F.linear(x, self.more.weight)
        more = self.more(x)
        if self.how == "detaches":
            return y + more.detach()
        if self.how == "overflows":
            return y + (more - more) / (more - more)
        return y + 0 * more if self.how == "zeroes" else y + more


def blocks(how: str = "") -> Any:
    torch.manual_seed(0)
    return nn.Sequential(Block(how), nn.Linear(8, 3))


@pytest.mark.fault("B5")
@pytest.mark.fault("C1")
@pytest.mark.fault("J1")
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("reads", r"the adapter at 0.more has no effect: Block, .*target_parameters=\[\"more.weig"),
        (
            "detaches",
            r"trains here gets no gradient: 0.more: default.lora.A, 0.more: default.lora.B\. Look",
        ),
        ("overflows", r"gets a gradient that is not finite: 0.more: default.lora.A, 0.more"),
        ("zeroes", r"trains here gets a gradient of zeros alone: 0.more\. Look"),
    ],
)
def test_what_has_no_effect_is_named(how: str, text: str) -> None:
    config = LoraConfig(r=2, target_modules=r"0\.(on|more|experts\.0)|1")
    model = get_peft_model(blocks(how), config)
    shake(model, seed=1)
    with pytest.raises(TrainingError, match=text):
        model.assert_effective(torch.randn(4, 8))
    assert all(p.grad is None for p in model.parameters())


def test_what_a_batch_does_not_need_is_told_and_no_error() -> None:
    model = get_peft_model(blocks(), LoraConfig(r=2, target_modules=r"0\.(on|experts\.\d)"))
    found = model.assert_effective(torch.randn(4, 8))
    assert found.waiting == ["0.experts.1"] and found.reached == ["0.on", "0.experts.0"]
    assert "1 not needed for this batch" in str(found)


def test_a_model_without_gradients_and_states_without_effect() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x = torch.randn(4, 8)
    model = get_peft_model(Frozen(), LoraConfig(r=2, target_modules=["inner"])).eval()
    with pytest.raises(TrainingError, match=r"no gradient reaches .*look for torch.no_grad\(\)"):
        model.assert_effective(x)
    model.set_requires_grad("default", False)
    with pytest.raises(TrainingError, match=r"\['default'\] change nothing: the outputs are those"):
        model.assert_effective(x)
    model.set_requires_grad("default", True)
    shake(model, seed=1)
    model.set_requires_grad("default", False)
    found = model.assert_effective(x)
    assert found.trained == 0 and found.change > 0
    with model.disable_adapter(), pytest.raises(StateError, match="no adapter is active"):
        model.assert_effective(x)
    model.merge_adapter()
    with pytest.raises(StateError, match="adapters are merged into the weights"):
        model.assert_effective(x)
