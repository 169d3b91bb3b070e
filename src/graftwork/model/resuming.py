"""What a resumed training needs beyond an adapter's own file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FileError
from ..files import codec

if TYPE_CHECKING:
    from .peft_model import PeftModel


def training_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What its parts share that is in no file, and the state of its schedule, which counts also
    where the adapter is frozen for now.
    """
    switch = model.base_model.switch
    schedule, shared = switch.schedules.get(name), switch.shared.get(name)
    state = {} if shared is None else shared.training_state()
    out = {f"{codec.MARK}:{key}": tensor.detach() for key, tensor in state.items()}
    if schedule is None or (schedule.first() is None and not schedule.step):
        return out
    out["step"] = torch.tensor(schedule.step)
    for path, adapter in schedule.adapters.items():
        out.update(
            {f"{path}:{key}": tensor.detach() for key, tensor in adapter.training_state().items()}
        )
    return out


def load_training_state(model: PeftModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Take back what ``training_state`` gave."""
    switch = model.base_model.switch
    schedule = switch.schedules.get(name)
    with torch.no_grad():
        if state := at(codec.MARK, tensors):
            switch.shared[name].load_training_state(state)
        if schedule is not None and "step" in tensors:
            schedule.step, schedule.version = int(tensors["step"]), None
            for path, adapter in schedule.adapters.items():
                adapter.load_training_state(at(path, tensors))


def check(model: PeftModel, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a schedule's state that is that of an adapter of other shapes.

    Raises:
        FileError: it is; nothing has been changed.
    """
    schedule = model.base_model.switch.schedules.get(name)
    if schedule is not None and "step" in tensors:
        for path, adapter in schedule.adapters.items():
            own = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
            state = {k: t for k, t in at(path, tensors).items() if k in own}
            need_alike(state, own, where)  # the rest are statistics, which it may not have yet


def need_alike(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Refuse a training state that does not fit.

    Raises:
        FileError: tensors are missing, or of other shapes.
    """
    if {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in own.items()}:
        raise FileError(
            f"the training state in {where} is that of another config than this adapter has: "
            f"{sorted(state)} there, {sorted(own)} here, or of other shapes; load it with the "
            "config that it was saved with"
        )


def at(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a training state holds of one part."""
    return {k.partition(":")[2]: v for k, v in tensors.items() if k.partition(":")[0] == path}
