"""PEFT's functions on any model: inject adapters, read and write their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig, TargetConfig
from ..engine import inject as injection
from ..engine.forwards import each_forward
from ..engine.inject import delete
from ..engine.root import Grafted
from ..engine.switch import Switch
from ..engine.tree import hosts, inside
from ..errors import FileError, StateError
from ..fast import shards
from ..files import codec
from ..files.folder import read_tensors
from ..files.hub import Source
from ..files.intact import intact
from ..targets.offer import Offer
from ..targets.replicas import replicated, restore
from . import canary as _canary  # noqa: F401 - watches trainings
from . import layer as _layer  # noqa: F401 - gives hosts PEFT's names
from . import scales as _scales  # noqa: F401
from . import vocabulary


def user_model(model: nn.Module) -> nn.Module:
    """The user's own model inside a wrapper of this library, or itself."""
    inner = inside(getattr(model, "base_model", model))
    return inner.model if isinstance(inner, Grafted) else model


def switch_of(model: nn.Module) -> Switch:
    """The switch of a model with adapters.

    Raises:
        StateError: it has none.
    """
    switch = injection.switch_of(user_model(model))
    if switch is None:
        raise StateError(
            f"this {type(model).__name__} has no adapters; attach one with get_peft_model(model, "
            "LoraConfig(r=8))"
        )
    return switch


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Add an adapter to a model in place, without any wrapper around the model, and make it the
    active one.

    Args:
        peft_config: the method and where it goes.
        model: any module.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: leave its tensors on the meta device, for a state dict that follows.
        state_dict: take the target layers from these names instead of from the config.
    """
    if not isinstance(peft_config, TargetConfig):
        raise TypeError(
            f"a {type(peft_config).__name__} does not say which layers to adapt, so it cannot be "
            "injected"
        )
    model = user_model(model)
    if state_dict is not None:
        peft_config = _targets_of(peft_config, model, state_dict)
    switch = injection.inject(model, peft_config, adapter_name, meta=low_cpu_mem_usage)
    model.peft_config = switch.configs  # type: ignore[assignment]
    if switch.active != (adapter_name,):
        set_adapter(model, adapter_name, peft_config.inference_mode)
    return model


def _targets_of(
    config: TargetConfig, model: nn.Module, tensors: Mapping[str, Tensor]
) -> TargetConfig:
    from copy import copy

    names = [key.removeprefix(codec.PREFIX) for key in tensors]
    switch = injection.switch_of(model) or Switch()
    with replicated(model, config, switch):
        offer = Offer(model)
    paths = {
        p for p in offer.modules if offer.adaptable(p) and any(n.startswith(f"{p}.") for n in names)
    }
    if not switch.configs:
        restore(model)
    if not paths:
        raise FileError(
            "no name in state_dict belongs to a layer of the model" + f"; e.g. {names[:3]}"
        )
    new = copy(config)
    new.target_modules = paths
    return new


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names.

    Args:
        model: a ``PeftModel``, or a model with injected adapters (the names then have no
            ``base_model.model.``).
        state_dict: the model's own state dict, where its tensors had to be gathered from elsewhere.
        adapter_name: which adapter.
        unwrap_compiled: PEFT's option; compiled models are always looked through.
        save_embedding_layers: also the base's embedding and output weights; "auto": where the
            adapter changes them, or where the vocabulary has another size than the base model's
            config says and the adapter does not hold all new rows itself.
    """
    inner = user_model(model)
    switch_of(model).check((adapter_name,))
    values = None if state_dict is None else within(model, state_dict)
    tensors = codec.state(inner, adapter_name, values)
    if save_embedding_layers == "auto":
        save_embedding_layers = vocabulary.needed(inner, adapter_name)
    if save_embedding_layers:
        tensors.update(vocabulary.tensors_of(inner, adapter_name, tensors, values))
    tensors = codec.apart(tensors)
    return {codec.full(key, inner is not model): tensor for key, tensor in tensors.items()}


def within(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's tensors by their names in the user's model, in a wrapper or not."""
    inner = user_model(model)
    front = next((f"{path}." for path, m in model.named_modules() if m is inner and path), "")
    plain = {shards.plain_path(key): tensor for key, tensor in tensors.items()}
    front = shards.plain_path(front)
    return {k.removeprefix(front): t for k, t in plain.items() if k.startswith(front)}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: str = "error",
) -> codec.LoadReport:
    """Give an adapter the values of a state dict in PEFT's names.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        peft_model_state_dict: the tensors, with or without ``base_model.model.`` in front.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out tensors of another shape.
        low_cpu_mem_usage: PEFT's option; tensors on the meta device always become real.
        strict: "error", or "warn" to take what fits.

    Raises:
        FileError: a tensor is missing, unexpected or of another shape.
    """
    inner = user_model(model)
    switch = switch_of(model)
    with switch.change(adapter_name):
        switch.check((adapter_name,))
        parts = codec.owned(inner, adapter_name)
        tensors = dict(peft_model_state_dict)
        with codec.whole(inner, parts, write=True):
            report, found = codec.compare(inner, parts, tensors)
            if ignore_mismatched_sizes and report.reshaped:
                bad = {line.rpartition(": (")[0] for line in report.reshaped}
                found = {plain: key for plain, key in found.items() if key not in bad}
                report.reshaped = []
            codec.judge(report, "the state dict", strict == "error")
            with intact(inner, adapter_name, codec.carried(inner, parts, tensors, found).values()):
                codec.fill(inner, parts, tensors, found)
            return report


def load_peft_weights(
    model_id: str,
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    allow_pickle: bool = False,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter on disk or on the hub, under the names in the file.

    Args:
        model_id: a folder or a hub id.
        device: where to; by default the CPU.
        key_mapping: regex -> replacement for names.
        allow_pickle: read ``adapter_model.bin`` too.
        **hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token``, ...
    """
    tensors = read_tensors(Source(model_id, **hf_hub_download_kwargs), device, allow_pickle)
    return {
        codec.PREFIX + codec.renamed(k, key_mapping) if key_mapping else k: t
        for k, t in tensors.items()
    }


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None
) -> None:
    """Drop an adapter of a model with injected ones; the last two arguments are PEFT's."""
    switch = switch_of(model)
    delete(user_model(model), switch, switch.check((adapter_name,)))


def set_adapter(
    model: nn.Module, adapter_name: Any, inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make adapters of a model with injected adapters active."""
    switch_of(model)
    Grafted.around(user_model(model)).set_adapter(adapter_name, inference_mode)


@contextmanager
def using(
    model: nn.Module, *names: str, rows: Sequence[str] | None = None, **values: Any
) -> Iterator[None]:
    """Within the block, in this thread, a model with injected adapters computes with this choice.

    Args:
        model: a model with adapters, wrapped or not.
        *names: the active adapters, the lowest first; none: those that are active.
        rows: one adapter name for each row of the batch instead, ``"__base__"`` for none.
        **values: what adapters read from a call, such as ``task_ids``.
    """
    root = Grafted.around(user_model(model))
    names = names or tuple(root.active_adapters)
    with root.using(*names, rows=rows, **values), each_forward(root, rows or names):
        yield


def set_requires_grad(model: nn.Module, adapter_names: Any, requires_grad: bool = True) -> None:
    """Freeze or unfreeze adapters of a model with injected adapters."""
    names = switch_of(model).check(adapter_names)
    for host in hosts(user_model(model)).values():
        host.set_requires_grad(names, requires_grad)
