"""One of two processes that train a sharded model; prints how far it is from one process alone."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from graftwork import LoraConfig
from graftwork.fast import choose, linear
from test_fast import adapted, inputs, same


def main(rank: int, port: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=sys.argv[3] == "dora")
    alone, sharded, x = adapted(config), adapted(config), inputs()
    for block in sharded.base_model.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(sharded.base_model.model, mesh=mesh)
    leads: list[int] = []
    choose.FEW = 0
    forward = linear.Layers.forward
    linear.Layers.forward = staticmethod(lambda *a: (leads.append(1), forward(*a))[1])  # type: ignore
    for _ in range(2):
        found: list[Any] = []
        for model in (alone, sharded):
            model.zero_grad()
            leads.clear()
            model(x).square().sum().backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            grads = [p.grad for p in trained]
            found.append([g.full_tensor() if isinstance(g, DTensor) else g for g in grads])
            assert len(leads) == 8  # of 14 layers
        same(found[1], found[0])  # both processes have the same data, and gradients are averaged
    dist.destroy_process_group()
    print("the same")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
