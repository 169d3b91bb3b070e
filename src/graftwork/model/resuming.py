"""What a resumed training needs beyond an adapter's own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import FileError
from ..files import codec

if TYPE_CHECKING:
    from .peft_model import PeftModel

RANDOM = "/"  # in front of the path of a part with random numbers of its own: no path begins so


def training_state(
    model: PeftModel, name: str, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What its parts share that is in no file, the state of its schedule, which counts also where
    the adapter is frozen for now, and where random numbers of its own go on. ``values``: the
    model's tensors, where somebody has gathered them.
    """
    base = model.get_base_model()
    with codec.whole(base, codec.owned(base, name), values):
        return _training_state(model, name)


def _training_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    switch = model.base_model.switch
    schedule, shared = switch.schedules.get(name), switch.shared.get(name)
    state = {} if shared is None else shared.training_state()
    out = {f"{codec.MARK}:{key}": tensor.detach() for key, tensor in state.items()}
    out |= {key: drawn.get_state() for key, drawn in _generators(model.get_base_model(), name)}
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
        if state := of_part(codec.MARK, tensors):
            switch.shared[name].load_training_state(state)
        draws = any(key.startswith(RANDOM) for key in tensors)
        for key, drawn in _generators(model.get_base_model(), name) if draws else ():
            if key in tensors:
                drawn.set_state(tensors[key].clone())
        if schedule is not None and "step" in tensors:
            schedule.step, schedule.version = int(tensors["step"]), None
            for path, adapter in schedule.adapters.items():
                adapter.load_training_state(of_part(path, tensors))


def check(model: PeftModel, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a schedule's state that is that of an adapter of other shapes.

    Raises:
        FileError: it is; nothing has been changed.
    """
    schedule = model.base_model.switch.schedules.get(name)
    if schedule is not None and "step" in tensors:
        for path, adapter in schedule.adapters.items():
            own = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
            state = {k: t for k, t in of_part(path, tensors).items() if k in own}
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


def of_part(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a training state holds of one part."""
    own = ((k.rpartition(":"), tensor) for k, tensor in tensors.items())  # a path may have one too
    return {key: tensor for (front, _, key), tensor in own if front == path}


def _generators(model: nn.Module, name: str) -> Iterator[tuple[str, torch.Generator]]:
    """The generators that an adapter's parts draw from, by names of their own."""
    for owned in codec.owned(model, name):
        for inner, module in owned.part.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, torch.Generator):
                    yield f"{RANDOM}{owned.front}{inner}:{key}", value
