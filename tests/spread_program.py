"""One of two processes that hold a model in parts; each scenario compares it with one process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from graftwork import (
    AdaLoraConfig,
    BottleneckConfig,
    FullConfig,
    IA3Config,
    LilyConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    StateError,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from graftwork.testing.bench import shake
from graftwork.testing.entry import IDS, Small

TARGETS = {"up", "down"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=3, target_modules=TARGETS, bias="lora_only"),
    "dora": lambda: LoraConfig(r=3, target_modules=TARGETS, use_dora=True),
    "whole": lambda: LoraConfig(
        r=2, target_modules=["up"], modules_to_save=["head"], trainable_token_indices=[1, 3, 7]
    ),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down"]),
    "loha": lambda: LoHaConfig(r=2, target_modules=TARGETS),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "vera": lambda: VeraConfig(r=4, target_modules=TARGETS),
    "unilora": lambda: UniLoraConfig(r=2, theta_d_length=32, target_modules=TARGETS),
    "vblora": lambda: VBLoRAConfig(
        r=2, num_vectors=8, vector_length=4, topk=2, target_modules=TARGETS
    ),
    "lily": lambda: LilyConfig(r=2, num_B=2, target_modules=TARGETS),
    "adalora": lambda: AdaLoraConfig(
        init_r=3, target_r=2, total_step=8, tinit=1, tfinal=2, deltaT=1, target_modules=TARGETS
    ),
    "full": lambda: FullConfig(target_modules=["down"]),
    "tokens": lambda: TrainableTokensConfig(target_modules=["embed"], token_indices=[0, 5, 2]),
    "bottleneck": lambda: BottleneckConfig(target_modules=TARGETS),
}

# whose layers share what trains: gradients of blocks are summed in another order
SUMMED = "unilora", "vblora", "lily"


def built(name: str, seed: int = 1) -> Any:
    torch.manual_seed(0)
    model: Any = get_peft_model(Small(), CONFIGS[name]())
    shake(model, seed=seed)
    return model.train()


def sharded(model: Any, mesh: Any) -> Any:
    """The same model, whose tensors the processes hold in parts."""
    model = copy.deepcopy(model)
    base = model.get_base_model()
    for block in base.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh)
    held = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert any(p.to_local().numel() < p.numel() for p in held)
    return model


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: Any, optimizer: Any, ids: Tensor) -> list[Tensor | None]:
    optimizer.zero_grad()
    model(ids).square().mean().backward()
    optimizer.step()  # penalties come here
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [None if g is None else full(g) for g in grads]


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def equal(one: dict[str, Tensor], other: dict[str, Tensor], rough: bool = False) -> None:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    assert all(t.shape == other[n].shape for n, t in one.items())
    for name, tensor in one.items() if rough else ():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)
    assert rough or not [n for n in one if not torch.equal(one[n], other[n])]


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    stem = {p: p.name.split("-")[0].split(".")[0] for p in folder.glob("*.safetensors")}
    return {name: load_file(path) for path, name in stem.items()}


def learns(name: str, mesh: Any, folder: Path, rank: int) -> None:
    """Gradients, steps, files and loading are those of one process, to the bit."""
    alone = built(name)
    together = sharded(alone, mesh)
    models = alone, together
    optimizers = [torch.optim.AdamW(trained(m), lr=0.02) for m in models]
    for i in range(3):  # both processes have the same data, and gradients are averaged
        ids = (IDS + i) % 12
        found = [step(m, o, ids) for m, o in zip(models, optimizers, strict=True)]
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            assert one is None or name in SUMMED or torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    if name in SUMMED:
        equal(get_peft_model_state_dict(alone), get_peft_model_state_dict(together), rough=True)
        set_peft_model_state_dict(alone, get_peft_model_state_dict(together))
    saves(alone, together, folder, rank)
    loads(name, together, folder)


def saves(alone: Any, together: Any, folder: Path, rank: int) -> None:
    equal(get_peft_model_state_dict(alone), get_peft_model_state_dict(together))
    together.save_pretrained(folder / "together")
    if rank == 0:
        alone.save_pretrained(folder / "alone")
    dist.barrier()
    one, other = files(folder / "alone"), files(folder / "together")
    assert one.keys() == other.keys()
    for file in one:
        equal(one[file], other[file])
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(together, options=options)  # as accelerate has it
    if rank == 0:  # no other process takes part
        together.save_pretrained(folder / "given", state_dict=gathered)
        given = files(folder / "given")
        assert given.keys() == one.keys()
        for file in one:
            equal(given[file], one[file])
    dist.barrier()


def loads(name: str, together: Any, folder: Path) -> None:
    other = built(name, seed=5)
    values = get_peft_model_state_dict(other)
    with torch.no_grad():
        together(IDS)  # FSDP may still hold what it had gathered
    if not together.base_model.switch.schedules:  # else it has other ranks by now
        set_peft_model_state_dict(together, values)
        equal(get_peft_model_state_dict(together), values)
        with torch.no_grad():
            assert torch.equal(together(IDS), other(IDS))
    together.load_adapter(folder / "alone", "default", is_trainable=True)
    again = PeftModel.from_pretrained(fresh(), folder / "together", is_trainable=True).train()
    equal(get_peft_model_state_dict(together), get_peft_model_state_dict(again))
    models = together, again  # and training goes on
    steps = [torch.optim.AdamW(trained(m), lr=0.02) for m in models]
    for _ in range(2):
        found = [step(m, o, IDS) for m, o in zip(models, steps, strict=True)]
    rough = name in SUMMED
    equal(get_peft_model_state_dict(together), get_peft_model_state_dict(again), rough)
    del found


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def halves(mesh: Any, rank: int) -> None:
    """Each process with half of the batch: the mean of their gradients is that of all of it."""
    for name in ("lora", "dora", "oft"):
        alone = built(name)
        together = sharded(alone, mesh)
        alone(IDS).square().mean().backward()
        together(IDS[rank * 2 : rank * 2 + 2]).square().mean().backward()
        for p, q in zip(trained(alone), trained(together), strict=True):
            torch.testing.assert_close(full(q.grad), p.grad)


def refuses(mesh: Any) -> None:
    """What needs whole layers says so, and changes nothing."""
    model = sharded(built("lora"), mesh)
    before = get_peft_model_state_dict(model)
    swapped = copy.deepcopy(before)
    verbs: dict[str, Callable[[], Any]] = {
        "merged": lambda: model.merge_adapter(),
        "merged here": lambda: model.merge_and_unload(),
        "adapted": lambda: model.add_adapter("b", CONFIGS["ia3"]()),
        "in parts": lambda: model.to_lora("default", "b"),
        "hold it in parts": lambda: model.add_weighted_adapter(["default"], [2.0], "b", "linear"),
        "processes hold": lambda: swap(model, swapped),
    }
    for text, verb in verbs.items():
        try:
            verb()
        except StateError as error:
            assert text in str(error) and "Attach adapters to the whole model" in str(error), error
        else:
            raise AssertionError(f"{text}: it was not refused")
        assert list(model.peft_config) == ["default"]
    equal(get_peft_model_state_dict(model), before)
    assert not any(row.merged for row in model.adapters())
    trains, every = model.get_nb_trainable_parameters()
    assert (trains, every) == built("lora").get_nb_trainable_parameters()


def swap(model: Any, tensors: dict[str, Tensor]) -> None:
    from graftwork import hotswap_adapter_from_state_dict

    hotswap_adapter_from_state_dict(model, tensors, "default", CONFIGS["lora"]())


def parallel(mesh: Any) -> None:
    """Tensor parallel layers are not adapted by halves."""
    base = fresh()
    for block in base.layers:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with torch.no_grad():
        torch.testing.assert_close(base(IDS), fresh()(IDS))
    for name in ("lora", "dora", "ia3", "full"):
        try:
            get_peft_model(base, CONFIGS[name]())
        except StateError as error:
            assert "processes hold it in parts" in str(error) and "Shard(dim=" in str(error)
        else:
            raise AssertionError(f"{name} was attached to a part of a layer")
    # what is not in parts can be adapted, and is saved as in one process
    plain = fresh()
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["head"]))
    torch.manual_seed(3)
    alone = get_peft_model(plain, LoraConfig(r=2, target_modules=["head"]))
    for one in (model, alone):
        shake(one)
        one(IDS).square().mean().backward()
    for p, q in zip(trained(alone), trained(model), strict=True):
        torch.testing.assert_close(full(q.grad), p.grad)
    equal(get_peft_model_state_dict(model), get_peft_model_state_dict(alone))


def main(rank: int, meeting: str, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in sys.argv[4:]:
        if name in CONFIGS:
            learns(name, mesh, folder / name, rank)
        else:
            {"halves": lambda: halves(mesh, rank), "refuses": lambda: refuses(mesh),
             "parallel": lambda: parallel(mesh)}[name]()  # fmt: skip
        print(f"{name}: the same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
