"""X-LoRA and Arrow, which stand upon trained LoRAs; more is in tests/test_xlora.py and
tests/test_lora_options.py.
"""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from torch import Tensor, nn

from graftwork import LoraConfig, PeftModel, XLoraConfig, inject_adapter_in_model
from graftwork.engine.inject import switch_of
from graftwork.methods.lora_options import ArrowConfig
from graftwork.testing.bench import Setup
from graftwork.testing.entry import Small
from graftwork.testing.layers import One
from specs import Case

FOLDERS = TemporaryDirectory()  # of the experts; gone with the tests


def lora(config: Any, alpha: int) -> LoraConfig:
    """A LoRA at the places of another config, as if it were trained."""
    return LoraConfig(
        r=2, lora_alpha=alpha, init_lora_weights=False, inference_mode=True,
        target_modules=config.target_modules,
    )  # fmt: skip


def experts(model: nn.Module, config: Any, x: Tensor) -> None:
    """Two LoRAs in folders, whose places are those of the mixture."""
    if config.adapters:  # it is loaded, and its folder has them
        return
    where = mkdtemp(dir=FOLDERS.name)
    for i in range(2):
        twin = copy.deepcopy(model)
        inject_adapter_in_model(lora(config, 3 + i), twin, f"e{i}")
        PeftModel.around(twin).save_pretrained(where, selected_adapters=[f"e{i}"])
        config.adapters[str(i)] = f"{where}/e{i}"
    config.hidden_size = {One: 6, Small: 8}.get(type(model))  # others have configs that say it


def tasks(model: nn.Module, config: Any, x: Tensor) -> None:
    """Two LoRAs in the model."""
    switch = switch_of(model)
    for i, name in enumerate(config.arrow_config.task_adapter_names):
        if switch is None or name not in switch.configs:
            inject_adapter_in_model(lora(config, 3 + i), model, name)


def arrow(**options: Any) -> LoraConfig:
    router = ArrowConfig(**options)
    router.task_adapter_names = ["t0", "t1"]
    return LoraConfig(arrow_config=router)


CASES = {
    "xlora": Case(
        XLoraConfig, row="XLORA", identity=False,
        setup=Setup(before=experts), lacks="fold",
        but="linear conv1d conv2d conv2d_groups conv2d_depthwise conv3d",
    ),
    "arrow": Case(
        lambda: arrow(top_k=1), row="Arrow", alone=False, setup=Setup(before=tasks),
        lacks="fold ids", but="conv1d conv2d conv2d_groups conv2d_depthwise conv3d",
        other=lambda: arrow(top_k=2, router_temperature=0.5),
    ),
}  # fmt: skip
