"""LoRA's variants beyond the laws: Arrow and QALoRA beside the real peft, aLoRA in generation, the
penalties of KaSA and MonteCLoRA, what VeLoRA keeps, and errors.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftwork
from graftwork import LoraConfig, PeftModel, get_peft_model
from graftwork.errors import StateError
from graftwork.methods.arrow import create_arrow_model
from graftwork.methods.lora_options import ArrowConfig
from graftwork.testing.bench import shake
from tiny import IDS, build

pytestmark = pytest.mark.filterwarnings("ignore")
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
TOKEN = 32  # in either row of IDS


def lora(seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = get_peft_model(build("llama"), LoraConfig(**QV, **options)).eval()
    shake(model, seed=seed)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **call: Any) -> torch.Tensor:
    return model(input_ids=ids, **call).logits


# -- Arrow


@pytest.fixture
def saved(tmp_path: Path) -> list[str]:
    """Four saved LoRAs."""
    paths = [str(tmp_path / str(seed)) for seed in range(4)]
    for seed, path in enumerate(paths):
        lora(seed, lora_alpha=4 + seed).save_pretrained(path)
    return paths


@pytest.mark.parametrize("use_gks", [False, True])
def test_arrow_answers_as_in_peft(saved: list[str], use_gks: bool) -> None:
    peft: Any = pytest.importorskip("peft")
    from peft.tuners.lora import create_arrow_model as theirs_of

    options = {"top_k": 2, "router_temperature": 0.5, "use_gks": use_gks, "rng_seed": 3}
    general = saved[3:] if use_gks else None
    theirs = theirs_of(build("llama"), saved[:3], peft.ArrowConfig(**options), general).eval()
    ours = create_arrow_model(build("llama"), saved[:3], ArrowConfig(**options), general).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    with ours.using("task_1"):  # PEFT writes into the adapters that are routed
        torch.testing.assert_close(logits(ours), logits(lora(1, lora_alpha=5)))


def test_arrow_of_one_adapter_is_that_adapter(saved: list[str]) -> None:
    model = create_arrow_model(build("llama"), saved[:1], ArrowConfig()).eval()
    torch.testing.assert_close(logits(model), logits(lora(0, lora_alpha=4)))
    torch.testing.assert_close(logits(copy.deepcopy(model)), logits(model))
    mixed = logits(model, adapter_names=["arrow_router", "__base__"])
    torch.testing.assert_close(mixed[:1], logits(model, IDS[:1]))
    torch.testing.assert_close(mixed[1:], logits(build("llama"), IDS[1:]))


def test_arrow_refuses_what_it_cannot_route(saved: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        create_arrow_model(build("llama"), [], ArrowConfig())
    with pytest.raises(ValueError, match="general_adapter_paths"):
        create_arrow_model(build("llama"), saved, ArrowConfig(use_gks=True))
    lora(1, rank_pattern={"v_proj": 2}).save_pretrained(saved[1])
    with pytest.raises(ValueError, match="other ranks"):
        create_arrow_model(build("llama"), saved, ArrowConfig())
    model = create_arrow_model(build("llama"), saved[:1], ArrowConfig())
    model.delete_adapter("task_0")
    with pytest.raises(StateError, match="task_0"):
        logits(model)


# -- QALoRA, which PEFT has for GPTQ layers alone


def test_qalora_answers_as_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft: Any = pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import QALoraLinearVariant

    ours = lora(use_qalora=True, qalora_group_size=4)
    ours.save_pretrained(tmp_path)
    variant = lambda *_, **__: QALoraLinearVariant()  # noqa: E731
    monkeypatch.setattr(Linear, "resolve_lora_variant", variant)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


# -- aLoRA


def test_alora_acts_from_the_invocation_on() -> None:
    model = lora(alora_invocation_tokens=[TOKEN])
    base, full = logits(build("llama")), logits(model)
    for row, ids in enumerate(IDS.tolist()):
        start = ids.index(TOKEN)
        torch.testing.assert_close(full[row, :start], base[row, :start])
        assert not torch.allclose(full[row, start], base[row, start])
    torch.testing.assert_close(logits(model, IDS[:, :2]), base[:, :2])  # never invoked
    given = [8 - ids.index(TOKEN) for ids in IDS.tolist()]
    torch.testing.assert_close(logits(model, alora_offsets=given), full)
    torch.testing.assert_close(logits(model, alora_offsets=[None, 0]), base)
    with pytest.raises(StateError, match="alora_offsets"), torch.no_grad():
        model(inputs_embeds=torch.zeros(2, 3, 32))


def test_alora_finds_the_last_of_several_invocations() -> None:
    ids = torch.tensor([[5, 6, 9, 5, 6, 7], [5, 9, 6, 5, 7, 9], [9, 9, 9, 9, 5, 6]])
    model = lora(alora_invocation_tokens=[5, 6])
    base, full = logits(build("llama"), ids), logits(model, ids)
    changed = (full - base).abs().amax(-1) > 1e-6
    assert changed.tolist() == [[False] * 3 + [True] * 3, [False] * 6, [False] * 4 + [True] * 2]


def test_alora_generates_as_in_peft(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    ours = lora(alora_invocation_tokens=[TOKEN], task_type="CAUSAL_LM")
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    ids = torch.cat([IDS, IDS[:1].clamp(max=TOKEN - 1)])  # the last row never invokes it
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8,
            "do_sample": False, "pad_token_id": 0}  # fmt: skip
    got = ours.generate(**call)
    assert torch.equal(got, theirs.generate(**call))
    assert torch.equal(got, ours.generate(**call, use_cache=False))
    beams = ours.generate(**call, num_beams=3)
    base = build("llama").eval().generate(**call, num_beams=3)
    assert torch.equal(beams[2], base[2])


def test_alora_in_a_mixed_batch() -> None:
    model = lora(alora_invocation_tokens=[TOKEN])
    model.add_adapter("other", LoraConfig(**QV, alora_invocation_tokens=[23]))
    model.add_adapter("plain", LoraConfig(**QV))
    model.set_requires_grad(["other", "plain"])
    shake(model, seed=5)
    ids = torch.cat([IDS, IDS])
    rows = ["other", "default", "plain", "other"]
    mixed = logits(model, ids, adapter_names=rows)
    for i, name in enumerate(rows):
        with model.using(name):
            torch.testing.assert_close(mixed[i : i + 1], logits(model, ids[i : i + 1]))


# -- penalties


@pytest.mark.parametrize(
    "options", [{"kasa_config": {"beta": 0.1, "gamma": 0.1}},
                {"monteclora_config": {"kl_loss_weight": 0.1, "sample_scaler": 0.0}}]
)  # fmt: skip
def test_a_penalty_comes_with_the_loss(options: dict[str, Any]) -> None:
    model = lora(**options)
    bare = float(model(input_ids=IDS, labels=IDS).loss)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert float(twin.train()(input_ids=IDS, labels=IDS).loss) > bare + 0.1
    assert model.peft_config["default"].has_penalty()
    assert not lora().base_model.switch.schedules, "plain LoRA follows nothing"


def test_kasa_penalty_is_pefts(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    ours = lora(kasa_config={"beta": 0.3, "gamma": 0.2})
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    (schedule,) = ours.base_model.switch.schedules.values()
    want = float(theirs.base_model._get_kasa_loss())
    assert float(schedule.penalty()) == pytest.approx(want, rel=1e-5)


def _penalty(model: Any) -> Any:
    return model._get_kasa_loss()


def _loss(model: Any, labels: bool) -> torch.Tensor:
    """The loss that the model computes, or one that the program makes of the logits."""
    out = model(input_ids=IDS, labels=IDS if labels else None)
    return out.loss if labels else out.logits.square().mean()


def _own(model: Any) -> torch.Tensor:
    """With labels, and yet a loss of the program's own."""
    return model(input_ids=IDS, labels=IDS).logits.square().mean()


# how a program comes to its loss -> that, where the penalty is in it by the engine alone
WAYS: dict[str, tuple[Any, Any]] = {
    "the model's loss": (
        lambda m: _loss(m, True) + _penalty(m), lambda m: _loss(m, True)
    ),
    "asked before": (
        lambda m: _penalty(m) + _loss(m, True), lambda m: _loss(m, True)
    ),
    "its own loss": (
        lambda m: _loss(m, False) + _penalty(m), lambda m: _loss(m, False)
    ),
    "its own loss beside labels": (lambda m: _own(m) + _penalty(m), lambda m: _loss(m, False)),
    "asked to be shown": (
        lambda m: _loss(m, False) + float(_penalty(m)) * 0, lambda m: _loss(m, False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_program_that_adds_a_penalty_itself_counts_it_once(way: str) -> None:
    results = []
    for loss_of in WAYS[way]:
        model = lora(kasa_config={"beta": 0.5, "gamma": 0.5}).train()
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.01)
        for _ in range(3):
            for _ in range(2):  # gradients are accumulated
                (loss_of(model) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in weights]))
    torch.testing.assert_close(*results)


def test_pefts_names_of_the_penalties(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    model = lora(kasa_config={"beta": 0.3, "gamma": 0.2}).train()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    want = float(theirs._get_kasa_loss())
    for call in ({}, {"adapter_names": "default"}, {"adapter_names": ["default", "other"]}):
        for owner in (model, model.base_model):
            assert float(owner._get_kasa_loss(**call)) == pytest.approx(want, rel=1e-5)
    assert model._get_monteclora_loss() == theirs._get_monteclora_loss() == 0.0
    assert model._get_kasa_loss("other") == 0.0
    bare = float(model.eval()(input_ids=IDS, labels=IDS).loss)
    model = lora(kasa_config={"beta": 0.3, "gamma": 0.2}).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    assert float(loss) == pytest.approx(bare + want, rel=1e-4)
    rest = model._get_kasa_loss()
    assert float(rest) == 0 and not rest.requires_grad, "the model's loss has it"
    model = lora(monteclora_config={"kl_loss_weight": 0.1, "sample_scaler": 0.0}).train()
    assert float(model._get_monteclora_loss()) > 0 and model._get_kasa_loss() == 0.0
    plain = lora()
    assert plain._get_kasa_loss() == plain.base_model._get_monteclora_loss() == 0.0


def test_monteclora_samples_in_training_alone() -> None:
    model = lora(monteclora_config={"sample_scaler": 1.0, "num_samples": 3})
    torch.testing.assert_close(logits(model), logits(model))
    one, two = (model.train()(input_ids=IDS).logits for _ in range(2))
    assert not torch.allclose(one, two)


def test_monteclora_noise_is_as_wide_as_pefts() -> None:
    pytest.importorskip("peft")
    from peft.tuners.lora.monteclora import MontecloraSampler

    model = lora(monteclora_config={"sample_scaler": 1.0, "num_samples": 3}).train()
    part = next(p for h in model.base_model.hosts().values() for p in h.parts(("default",)))
    theirs = MontecloraSampler(32, 4, 3, sample_scaler=1.0, buffer_size=2000, device="cpu")
    with torch.no_grad():
        theirs.std_prior.copy_(part.std)
        theirs.expert_weights_prior.copy_(part.logits)
        draws = [theirs() for _ in range(2000)]
    want = torch.stack([torch.einsum("n,nij->ji", w, noise) for noise, w in draws])
    got = torch.stack([part.factors()[0].detach() - part.A.detach() for _ in range(2000)])
    wide = [noise.square().mean((0, 2)) for noise in (got, want)]  # of each row of A
    torch.testing.assert_close(*wide, rtol=0.1, atol=0)


# -- VeLoRA


def test_velora_keeps_a_number_for_each_group() -> None:
    from graftwork.methods.velora import Compressed, unit

    x = torch.randn(5, 7, 12, requires_grad=True)
    a = torch.randn(2, 12, requires_grad=True)
    options = graftwork.LoraConfig(velora_config={"num_groups": 4}).velora_config
    h = Compressed.apply(x, a, unit(torch.ones(3)), options)
    kept = [t.numel() for t in h.grad_fn.saved_tensors]
    assert kept == [5 * 7 * 4, a.numel(), 3]
    h.square().sum().backward()
    assert x.grad is not None and a.grad is not None
    torch.testing.assert_close(x.grad, 2 * h.detach() @ a.detach())


# -- errors


@pytest.mark.parametrize(
    "options, says",
    [
        ({"use_dora": True, "kasa_config": {}}, "use_dora and kasa_config"),
        ({"init_lora_weights": "mica", "velora_config": {}}, "velora_config and mica"),
        ({"use_bdlora": {"nblocks": 2}, "init_lora_weights": "pissa"}, "another shape"),
        ({"velora_config": {"scale": 0}}, "scale=0 must be"),
        ({"velora_config": {"init_type": "mean"}}, "init_type"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, "either"),
        ({"kasa_config": {}, "ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoraConfig(**options)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"kasa_config": {}, "r": 64}, "r<"),
        ({"init_lora_weights": "mica", "r": 64}, "directions"),
        ({"use_qalora": True, "qalora_group_size": 5}, "try 4"),
        ({"use_bdlora": {"target_modules_bd_a": ["k_proj"], "nblocks": 2}}, "neither"),
        ({"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 3}}, "does not divide"),
        ({"kasa_config": {}, "init_lora_weights": "pissa"}, "takes directions"),
    ],
)
def test_options_that_fit_no_layer(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        get_peft_model(build("llama"), LoraConfig(**{**QV, **options}))


def test_adalora_has_no_variants() -> None:
    with pytest.raises(ValueError, match="AdaLoraConfig has no kasa_config"):
        graftwork.AdaLoraConfig(total_step=10, kasa_config={})


def test_a_config_file_brings_the_options_back(tmp_path: Path) -> None:
    lora(kasa_config={"beta": 0.5}).save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].kasa_config.beta == 0.5
    assert loaded.base_model.switch.schedules


def test_arrow_follows_the_adapters_that_it_goes_through(saved: list[str], tmp_path: Path) -> None:
    """Other values in a task's adapter are routed by their own direction."""
    model = create_arrow_model(build("llama"), saved[:2], ArrowConfig(top_k=1, rng_seed=0)).eval()
    before = logits(model)
    model.hotswap_adapter(saved[2], "task_1")
    other = create_arrow_model(
        build("llama"), [saved[0], saved[2]], ArrowConfig(top_k=1, rng_seed=0)
    ).eval()
    assert not torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)


def test_arrow_goes_through_starts_that_are_taken_away(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, init_lora_weights="pissa"))
    shake(model)
    model.save_pretrained(tmp_path)
    arrow = create_arrow_model(build("llama"), [str(tmp_path)], ArrowConfig()).eval()
    torch.testing.assert_close(logits(arrow), logits(model.eval()), rtol=1e-4, atol=1e-5)
