"""Models that several processes hold in parts: FSDP2, tensor parallel ones, and ZeRO-3."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork import (
    LoraConfig,
    OFTConfig,
    StateError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from graftwork.testing.bench import shake
from graftwork.testing.entry import IDS, Small

HERE = Path(__file__).parent
PLAIN = "lora dora whole ia3 loha oft vera adalora full tokens bottleneck".split()
SUMMED = ["unilora", "vblora", "lily"]  # whose layers share what trains


def two(program: str, folder: Path, *arguments: str) -> None:
    """Run a program as two processes that meet at a file, and see what they end with."""
    start = [sys.executable, str(HERE / program)]
    both = [
        subprocess.Popen(
            [*start, str(rank), str(folder / "meeting"), str(folder), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300)[0] for process in both]
    for one in told:
        assert f"{arguments[-1]}: the same" in one.splitlines(), one[-4000:]


@pytest.mark.fault("A13")
@pytest.mark.fault("C13")
def test_two_processes_learn_save_and_load_as_one(tmp_path: Path) -> None:
    two("spread_program.py", tmp_path, *PLAIN, *SUMMED, "halves", "refuses", "parallel")


@pytest.mark.slow
@pytest.mark.fault("A13")
@pytest.mark.fault("C13")
def test_accelerate_trains_and_saves_a_sharded_model_by_pefts_names(tmp_path: Path) -> None:
    two("accelerate_program.py", tmp_path, "prompt-full", "lora-sharded", "lora-full")


# -- ZeRO-3, by a stand-in that does to parameters what it does


def partition(model: nn.Module) -> None:
    for i, p in enumerate(model.parameters()):
        p.ds_shape, p.ds_numel, p.ds_id = p.shape, p.numel(), i  # type: ignore
        p.ds_tensor, p.ds_status = p.data.clone(), "NOT_AVAILABLE"  # type: ignore
        p.data = torch.empty(0)


class Zero:
    """What deepspeed.zero has for reading partitioned parameters."""

    @staticmethod
    @contextmanager
    def GatheredParameters(  # noqa: N802 - DeepSpeed's name
        params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> Iterator[None]:
        params = list(params)
        for p in params:
            p.data = p.ds_tensor.clone()
        try:
            yield
        finally:
            for p in params:
                if modifier_rank is not None:
                    p.ds_tensor = p.data.clone()
                p.data = torch.empty(0)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("deepspeed")
    module.zero = Zero  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", module)


def built(seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    base = Small()
    torch.manual_seed(2)
    config = LoraConfig(
        r=3, target_modules=["up", "down"], modules_to_save=["head"], bias="lora_only", **options
    )
    model = get_peft_model(base, config)
    shake(model, seed=seed)
    return model.eval()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [n for n in one if not torch.equal(one[n], other[n])]


READS: dict[str, Callable[[Any, Path], Any]] = {
    "save": lambda m, f: m.save_pretrained(f),
    "state dict": lambda m, f: get_peft_model_state_dict(m),
    "take": lambda m, f: set_peft_model_state_dict(m, get_peft_model_state_dict(built(5))),
    "load": lambda m, f: m.load_adapter(f, "default"),
    "merge": lambda m, f: m.merge_adapter(),
    "unload": lambda m, f: m.merge_and_unload(),
    "convert": lambda m, f: m.to_lora("default", "b"),
    "combine": lambda m, f: m.add_weighted_adapter(["default"], [2.0], "b", "linear"),
    "swap": lambda m, f: m.hotswap_adapter(f, "default"),
    "add": lambda m, f: m.add_adapter("b", OFTConfig(oft_block_size=4, target_modules=["up"])),
}


@pytest.mark.fault("A13")
@pytest.mark.parametrize("name", [n for n in READS if n not in ("swap", "add")])
def test_a_partitioned_tensor_is_never_taken_for_the_whole(name: str, tmp_path: Path) -> None:
    built(3).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = built()
    partition(model)
    held = [p.ds_tensor.clone() for p in model.parameters()]
    with pytest.raises(StateError, match="ZeRO-3") as error:
        READS[name](model, tmp_path)
    assert "GatheredParameters" in str(error.value) or "in one process" in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert list(model.peft_config) == ["default"] and not model.base_model.merged()
    assert all(p.numel() == 0 for p in model.parameters())
    assert all(torch.equal(p.ds_tensor, t) for p, t in zip(model.parameters(), held, strict=True))


@pytest.mark.fault("A13")
def test_deepspeed_gathers_what_is_saved_and_takes_what_is_loaded(
    tmp_path: Path, deepspeed: None
) -> None:
    model, twin = built(), built()
    partition(model)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("twin", "model"))
    equal(one, other)
    new = get_peft_model_state_dict(built(5))
    set_peft_model_state_dict(model, new)
    equal(get_peft_model_state_dict(model), new)
    model.load_adapter(tmp_path / "twin", "default")
    equal(get_peft_model_state_dict(model), one)
    assert all(p.numel() == 0 for p in model.parameters())
    for name in ("merge", "convert", "combine"):  # the base's own weights are not gathered
        with pytest.raises(StateError, match="processes hold it in parts"):
            READS[name](model, tmp_path)


@pytest.mark.fault("A13")
def test_a_state_dict_that_the_engine_gathered_is_enough(tmp_path: Path) -> None:
    model, twin = built(), built()
    given = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    partition(model)
    model.save_pretrained(tmp_path, state_dict=given)
    equal(load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(twin))
    wrapped = {f"module.{n}": t for n, t in given.items()}  # not this model's names
    with pytest.raises(StateError, match="the state_dict that was given lacks it"):
        model.save_pretrained(tmp_path / "other", state_dict=wrapped)
    with pytest.raises(StateError, match="the state_dict that was given lacks it"):
        model.save_pretrained(tmp_path / "other", state_dict={})
    assert not (tmp_path / "other").exists()


@pytest.mark.fault("J2")
def test_partitioned_tensors_are_counted_as_wholes() -> None:
    model, twin = built(), built()
    partition(model)
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()


@pytest.mark.fault("C13")
def test_adapters_are_attached_to_partitioned_layers_whose_weights_they_do_not_read() -> None:
    base = Small()
    partition(base)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["up", "down"]))
    shapes = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    assert shapes == {(3, 8), (12, 3), (3, 12), (8, 3)}
    base = Small()
    partition(base)
    for config in (
        LoraConfig(r=3, target_modules=["up"], use_dora=True),
        LoraConfig(r=3, target_modules=["up"], init_lora_weights="pissa"),
        LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"]),
        LoraConfig(r=3, target_modules=["up"], bias="all"),
    ):
        with pytest.raises(StateError, match="ZeRO-3"):
            get_peft_model(base, config)
        assert not any(".adapters" in n for n, _ in base.named_modules())


@pytest.mark.fault("C13")
@pytest.mark.parametrize("mark", ["_hf_tp_plan", "_tp_info"])
def test_parts_that_are_known_by_a_plan_alone_are_not_adapted(mark: str) -> None:
    base = Small()
    setattr(base.layers[1].up, mark, "colwise")  # as older transformers mark plain tensors
    with pytest.raises(StateError, match=r"layers.1.up .*in parts: .*tensor parallel \(colwise\)"):
        get_peft_model(base, LoraConfig(r=3, target_modules=["up", "down"]))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["down"]))
    assert model(IDS).shape == (4, 4, 12)
