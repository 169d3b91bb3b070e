"""transformers' own ``model.load_adapter``, under ``as_peft()``: it knows PEFT's parameters by
name, so the method is replaced by one that loads as this library does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from ..config import PeftConfig
from ..engine import inject as injection
from ..engine.root import Grafted
from ..errors import StateError
from ..files.atomic import settled
from ..files.codec import LoadReport
from ..files.hub import HUB_OPTIONS, Source
from ..model.functional import (
    load_peft_weights,
    set_adapter,
    set_peft_model_state_dict,
)
from ..model.updating import (
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


def teach(module: ModuleType) -> None:
    """Replace the method in ``transformers.integrations.peft``."""
    mixin = module.__dict__.get("PeftAdapterMixin")
    if mixin is not None:
        mixin.load_adapter = load_adapter


def load_adapter(
    self: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: Mapping[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    local_files_only: bool = False,
    adapter_kwargs: dict[str, Any] | None = None,
    load_config: Any = None,
    **kwargs: Any,
) -> LoadReport:
    """Load an adapter into a model of transformers, in place; the arguments are transformers'.

    Raises:
        FileError: the folder does not fit.
        StateError: nothing says what to load, or the name is taken.
    """
    name = adapter_name or "default"
    given = {**getattr(load_config, "download_kwargs", {}), **kwargs}
    options = {k: v for k, v in given.items() if k in (*HUB_OPTIONS, "subfolder")}
    options |= {"local_files_only": True} if local_files_only else {}
    options |= adapter_kwargs or {}
    peft_model_id = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
        raise StateError("give peft_model_id, or both peft_config and adapter_state_dict")

    def read() -> tuple[Any, dict[str, Tensor]]:
        config = peft_config or PeftConfig.from_pretrained(str(peft_model_id), **options)
        return config, dict(adapter_state_dict or load_peft_weights(str(peft_model_id), **options))

    source = None if peft_model_id is None else Source(peft_model_id, options.get("subfolder"))
    config, tensors = settled(None if source is None else source.at, read)
    if isinstance(config, Mapping):
        config = PeftConfig.from_peft_type(**config)
    config.inference_mode = not is_trainable
    ready = getattr(self, "_hotswap_enabled", False)
    known = getattr(self, "peft_config", {}) if self._hf_peft_config_loaded else {}
    if hotswap is True or (hotswap and ready and name in known):
        return hotswap_adapter_from_state_dict(self, tensors, name, config)
    report = _add(self, config, name, tensors, low_cpu_mem_usage)
    if ready:
        prepare_model_for_compiled_hotswap(self, **self._prepare_peft_hotswap_kwargs)
    if not is_trainable:
        self.eval()
    return report


def _add(
    model: Any, config: Any, name: str, tensors: Mapping[str, Tensor], meta: bool
) -> LoadReport:
    """Put an adapter with its values in, and make it active; on an error the model is as it was."""
    first = injection.switch_of(model) is None
    switch = injection.inject(model, config, name, meta=meta)
    try:
        report = set_peft_model_state_dict(model, tensors, name)
    except BaseException:
        Grafted.around(model).unload() if first else injection.delete(model, switch, (name,))
        raise
    model.peft_config, model._hf_peft_config_loaded = switch.configs, True
    set_adapter(model, name, config.inference_mode)
    return report
