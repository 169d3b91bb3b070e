"""Programs for PEFT that train, and that hand models on."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from harness import fill, program
from programs_layers import IDS, LORA
from programs_models import lora
from torch import nn

from tiny import build


def trained(model: Any, optimizer: Any, steps: int = 3) -> list[float]:
    """The losses of a few steps."""
    losses = []
    for _ in range(steps):
        loss = model(IDS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@program()
def optimizers_of_peft(peft: Any) -> Any:
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    out: list[Any] = []
    model = lora(peft)
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=4)
    groups = sorted([len(g["params"]), g["lr"]] for g in optimizer.param_groups if g["params"])
    out += [groups, trained(model, optimizer)]
    model = lora(peft)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.01)
    before = model.base_model.model.lin0.lora_A["default"].weight.detach().clone()
    trained(model, optimizer)
    after = model.base_model.model.lin0.lora_A["default"].weight
    return [*out, torch.equal(before, after)]


@program()
def gradients_by_name(peft: Any) -> Any:
    model = lora(peft)
    model(IDS).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@program()
def a_saved_module_beside_trained_biases(peft: Any) -> Any:
    model = lora(peft, bias="all", modules_to_save=["head"])
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    loss = trained(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    state = peft.get_peft_model_state_dict(model)
    return [trains, loss, sorted(k for k in state if ".modules_to_save" not in k
                                 and ".original_module" not in k)]  # fmt: skip


@program()
def whole_models_are_pickled(peft: Any) -> Any:
    model, file = lora(peft), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    twin = pickle.loads(pickle.dumps(model))
    names = [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    return [again(IDS), twin(IDS), names, type(again.base_model).__name__]


@program()
def two_adapters_at_once(peft: Any) -> Any:
    model = lora(peft)
    model.add_adapter("b", peft.LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "b"])
    fill(model)
    model(IDS).square().mean().backward()
    grads = sorted(n for n, p in model.named_parameters() if p.grad is not None)
    out = [model(IDS), grads, model.active_adapters]
    model.set_adapter("b")
    alone = model(IDS)
    model.set_adapter("default")
    return [*out, alone, model(IDS)]


@program()
def precision(peft: Any) -> Any:
    model = peft.get_peft_model(build("plain").to(torch.bfloat16), peft.LoraConfig(**LORA))
    kinds = sorted({f"{n.rpartition('.lin')[2]} {p.dtype}" for n, p in model.named_parameters()})
    kept = peft.get_peft_model(
        build("plain").to(torch.bfloat16), peft.LoraConfig(**LORA), autocast_adapter_dtype=False
    )
    dtypes = {str(p.dtype) for p in kept.parameters()}
    from peft.functional import cast_adapter_dtype

    cast_adapter_dtype(kept, "default")
    return [kinds, dtypes, {str(p.dtype) for p in kept.parameters()}]


@program()
def empty_adapters_are_filled(peft: Any) -> Any:
    source = lora(peft)
    state = peft.get_peft_model_state_dict(source)
    model = peft.get_peft_model(build("plain"), peft.LoraConfig(**LORA), low_cpu_mem_usage=True)
    out = [sorted({p.device.type for n, p in model.named_parameters() if "lora" in n})]
    peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    return [*out, sorted({p.device.type for p in model.parameters()}), model.eval()(IDS)]


@program()
def a_loop_over_layers_by_type(peft: Any) -> Any:
    model = lora(peft)
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.to(torch.float64)
        if "norm" in name and isinstance(module, nn.LayerNorm):
            module.to(torch.float32)
    return {n: str(p.dtype) for n, p in model.named_parameters()}
