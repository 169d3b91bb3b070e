"""Optimizers that know a LoRA's factors: their groups and steps are PEFT's, and their own laws."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graftwork
from graftwork import LoraConfig, get_peft_model
from graftwork.engine.site import as_factors
from graftwork.optim.lorafa import projected
from graftwork.optim.pairs import pairs, roles
from graftwork.testing.bench import shake
from tiny import IDS, build, run

pytestmark = pytest.mark.filterwarnings("ignore")
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
RICH = {**PLAIN, "use_dora": True, "modules_to_save": ["lm_head"]}


def optimizers(library: Any) -> Any:
    """PEFT's package of optimizers, which `import peft` does not import; ours are at the top."""
    return library if library is graftwork else importlib.import_module("peft.optimizers")


def loraplus(library: Any, model: nn.Module) -> Any:
    make = optimizers(library).create_loraplus_optimizer
    options = {"lr": 1e-3, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1}
    return make(model, torch.optim.AdamW, **options, loraplus_lr_embedding=2e-3)


def lorafa(library: Any, model: nn.Module) -> Any:
    make = optimizers(library).create_lorafa_optimizer
    return make(model, r=4, lora_alpha=6, lr=1e-3, weight_decay=0.1)


def riemannian(library: Any, model: nn.Module) -> Any:
    make = optimizers(library).create_riemannian_optimizer
    return make(model, torch.optim.AdamW, lr=1e-3, reg=0.05, weight_decay=0.1)


def train(model: nn.Module, optimizer: Any, steps: int = 20) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(3, 64, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def both(options: dict[str, Any], folder: Path) -> tuple[Any, Any, Any]:
    """peft, a model of its, and ours with the same values."""
    peft = pytest.importorskip("peft", reason="the real peft is the oracle")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(**options))
    theirs.save_pretrained(folder)
    ours = graftwork.PeftModel.from_pretrained(build("llama"), folder, is_trainable=True)
    return peft, theirs, ours


@pytest.mark.parametrize("make", [loraplus, lorafa, riemannian])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_steps_are_pefts(
    make: Callable[..., Any], more: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    peft, theirs, ours = both({**PLAIN, **more}, tmp_path)
    # peft projects in bf16, on the CPU too; the formula is what is compared
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    train(theirs, make(peft, theirs))
    train(ours, make(graftwork, ours))
    want = peft.get_peft_model_state_dict(theirs)
    start = graftwork.load_peft_weights(str(tmp_path))
    for name, tensor in graftwork.get_peft_model_state_dict(ours).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-4, msg=name)
        moved = (tensor - start[name]).abs().max()
        assert (moved > 1e-3) == (make is not lorafa or "lora_B" in name), name


@pytest.mark.fault("L1")
@pytest.mark.parametrize(
    "options", [PLAIN, RICH, {**PLAIN, "target_modules": ["embed_tokens", "q_proj"]}]
)
def test_groups_of_loraplus_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    peft, theirs, ours = both(options, tmp_path)
    found = []
    for library, model in ((peft, theirs), (graftwork, ours)):
        state = library.get_peft_model_state_dict(model)
        names = {tensor.data_ptr(): name for name, tensor in state.items()}
        groups = loraplus(library, model).param_groups
        kept = [{k: g[k] for k in ("lr", "weight_decay")} for g in groups]
        found.append((kept, [{names.get(p.data_ptr(), "?") for p in g["params"]} for g in groups]))
    assert found[0] == found[1]


def test_norms_and_biases_do_not_decay() -> None:
    model = model_with(["lin0"], modules_to_save=["norm"], bias="lora_only", lora_bias=True)
    groups = loraplus(graftwork, model).param_groups
    assert [len(g["params"]) for g in groups] == [1, 0, 1, 4]  # A; B; gain and biases
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.1, 0.0]


def test_embeddings_keep_their_state_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    manager = SimpleNamespace(register_module_override=lambda *args: told.append(args))
    optim = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))  # type: ignore[arg-type]
    adam = type("AdamW8bit", (torch.optim.AdamW,), {})
    model = model_with(["lin0"])
    graftwork.create_loraplus_optimizer(model, adam, lr=1e-3, loraplus_lr_ratio=2)
    assert told == [(model.base_model.model.emb, "weight", {"optim_bits": 32})]


def model_with(targets: str | list[str], name: str = "plain", **options: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **options)
    model = get_peft_model(build(name), config)
    shake(model)
    return model


@pytest.mark.fault("L1")
@pytest.mark.parametrize("target", ["lin0", "conv1", "conv2", "conv3", "emb"])
def test_lora_fa_takes_the_nearest_step_of_its_rank(target: str) -> None:
    model = model_with([target])
    (part,) = pairs(model)
    out, in_ = part.site.shape
    g = torch.randn(out, in_, generator=torch.Generator().manual_seed(0))  # of W
    a, b = as_factors(part.A, part.B, part.lead)
    s = part.scale
    g_a, g_b = part.site.from_factors(s * b.mT @ g, s * g @ a.mT)
    part.A.grad, part.B.grad = g_a.detach(), g_b.detach()
    new = projected(part)
    if target == "emb":
        step, onto = s * b @ as_factors(new, part.B, ())[0], b @ torch.linalg.pinv(b) @ g
    else:
        step, onto = s * as_factors(part.A, new, ())[1] @ a, g @ torch.linalg.pinv(a) @ a
    torch.testing.assert_close(step, onto, rtol=1e-3, atol=1e-4)


def test_lora_fa_freezes_what_is_random_and_trains_the_rest() -> None:
    model = model_with(["emb", "lin0", "conv1"], bias="lora_only", modules_to_save=["head"])
    graftwork.create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-3)
    trained = [[p.requires_grad for p in roles(part)] for part in pairs(model)]
    assert trained == [[False, True]] * 3
    assert any(p.requires_grad and p.shape == (5, 16) for p in model.parameters())


@pytest.mark.parametrize("make", [loraplus, lorafa, riemannian])
def test_every_kind_of_layer_trains_and_resumes(make: Callable[..., Any]) -> None:
    options = {"use_dora": True, "target_parameters": ["experts.down_proj"], "bias": "all"}
    outputs = []
    for resumed in (False, True):
        targets = ["embed_tokens", "q_proj"]
        options["use_dora"] = False
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
        torch.manual_seed(0)
        model = get_peft_model(build("mixtral"), config)
        optimizer = make(graftwork, model)
        before = run(model, "mixtral")
        train(model, optimizer, 2)
        if resumed:
            state, optimizer = optimizer.state_dict(), make(graftwork, model)
            optimizer.load_state_dict(state)
        train(model, optimizer, 2)
        outputs.append(run(model, "mixtral"))
        assert (outputs[-1] - before).abs().max() > 1e-4
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.fault("L1")
def test_only_loras_are_preconditioned_and_the_rest_steps_as_usual() -> None:
    model = model_with(["lin0", "emb"], modules_to_save=["head"])
    optimizer = graftwork.create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=1e-3)
    assert type(optimizer) is torch.optim.SGD
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.ones_like(p)
    grads = {}
    for part in pairs(model):
        (a, b), eye = as_factors(part.A, part.B, part.lead), torch.eye(2) * 1e-3
        grads[part.A] = torch.linalg.inv(b.mT @ b + eye) @ torch.ones_like(a)
        grads[part.B] = torch.ones_like(b) @ torch.linalg.inv(a @ a.mT + eye)
    optimizer.step()
    for p in trained:
        want = grads.get(p, torch.ones_like(p))
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-4)


def test_what_is_wrong_is_told() -> None:
    bare, other = (
        nn.Linear(4, 4),
        get_peft_model(
            build("llama"), graftwork.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        ),
    )
    model = model_with(["lin0"])
    with pytest.raises(ValueError, match="no LoRA of this model trains; LoRA-FA"):
        graftwork.create_lorafa_optimizer(other, r=2, lora_alpha=3, lr=1e-3)
    with pytest.raises(ValueError, match="no LoRA of this model trains, so there is"):
        graftwork.create_riemannian_optimizer(bare, torch.optim.SGD, lr=1e-3)
    with pytest.raises(ValueError, match="no tensor of this model trains"):
        bare.requires_grad_(False)
        graftwork.create_loraplus_optimizer(bare, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=2)
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio=0 must be positive; try 16"):
        graftwork.create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=0)
    with pytest.warns(graftwork.PeftWarning, match=r"r=8 and lora_alpha=8 fit no LoRA .* \[1.5\]"):
        graftwork.create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)
    with pytest.raises(TypeError, match=r"give one such as torch\.optim\.AdamW"):
        graftwork.create_riemannian_optimizer(model, torch.optim, lr=1e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS computes the loss several times a step"):
        graftwork.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-3)
    optimizer = graftwork.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    with pytest.raises(ValueError, match="a closure computes new gradients inside the step"):
        optimizer.step(lambda: 0.0)
    for wrong in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must"):
            graftwork.LoraFAOptimizer(model.parameters(), **wrong)  # type: ignore[arg-type]


def test_lora_fa_without_loras_is_adamw() -> None:
    torch.manual_seed(0)
    ends = []
    for cls in (torch.optim.AdamW, graftwork.LoraFAOptimizer):
        model = build("llama")
        options = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}
        optimizer: Any = cls(model.parameters(), **options)
        train(model, optimizer, 3)
        ends.append(model(input_ids=IDS).logits)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)
