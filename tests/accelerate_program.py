"""One of two processes that train by accelerate's FSDP2, with Graftwork under peft's name.

accelerate has FSDP for accelerators alone; told that two CPUs are such, all else is its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import graftwork

graftwork.as_peft()

import accelerate.state  # noqa: E402
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.utils import DistributedType, fsdp_utils  # noqa: E402
from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import tiny  # noqa: E402
from graftwork.testing.bench import shake  # noqa: E402

IDS = tiny.IDS
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"], use_dora=True,
        modules_to_save=["lm_head"],
    ),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}  # fmt: skip


def built(name: str) -> Any:
    torch.manual_seed(2)
    model = get_peft_model(tiny.build("llama"), CONFIGS[name]())
    assert isinstance(model, graftwork.PeftModel)
    shake(model, 0.05)
    return model.train()


def accelerator(kind: str) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=kind,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    own = Accelerator(cpu=True)
    accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    shared = accelerate.state.AcceleratorState._shared_state
    shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return own


def train(model: Any, optimizer: Any, own: Accelerator | None = None) -> None:
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward() if own is None else own.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def scenario(name: str, folder: Path, kind: str) -> None:
    alone = built(name)
    train(alone, torch.optim.AdamW(trained(alone), lr=0.01))
    want = get_peft_model_state_dict(alone)
    own, model = accelerator(kind), built(name)
    model, optimizer = own.prepare(model, torch.optim.AdamW(trained(model), lr=0.01))
    assert any(isinstance(p, DTensor) for p in trained(model))
    train(model, optimizer, own)
    equal(get_peft_model_state_dict(model), want)
    values = own.get_state_dict(model)  # whole, in the first process alone
    inner = own.unwrap_model(model)
    if own.is_main_process:  # as a Trainer saves
        inner.save_pretrained(folder / "given", state_dict=values)
        equal(load_file(folder / "given" / "adapter_model.safetensors"), want)
    own.wait_for_everyone()
    inner.save_pretrained(folder / "asked", is_main_process=own.is_main_process)
    own.wait_for_everyone()
    equal(load_file(folder / "asked" / "adapter_model.safetensors"), want)
    plugin = own.state.fsdp_plugin
    for adapter_only in (True, False):  # a checkpoint of accelerate's
        where = folder / f"checkpoint-{adapter_only}"
        where.mkdir(exist_ok=True)
        fsdp_utils.save_fsdp_model(plugin, own, model, str(where), adapter_only=adapter_only)
        with torch.no_grad():
            for p in trained(model):
                p.mul_(2)
        fsdp_utils.load_fsdp_model(plugin, own, model, str(where), adapter_only=adapter_only)
        equal(get_peft_model_state_dict(model), want)
    again = PeftModel.from_pretrained(tiny.build("llama"), folder / "asked").eval()
    with torch.no_grad():
        got = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(got, again(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def main(rank: int, meeting: str, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    for name in sys.argv[4:]:
        config, kind = name.split("-")
        scenario(config, folder / name, f"{kind.upper()}_STATE_DICT")
        print(f"{name}: the same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
