"""transformers' own ``model.load_adapter``, under ``as_peft()``, with transformers before 5.18.

Later versions ask this library where the tensors of a file go; earlier ones know PEFT's names of
parameters by heart. For those, the method is replaced by one that loads as this library does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from ..config import PeftConfig
from ..errors import StateError
from ..files.codec import LoadReport
from ..files.hub import HUB_OPTIONS
from ..model.functional import (
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)

ASKS = (5, 18)  # the version of transformers that asks where tensors go


def teach(module: ModuleType) -> None:
    """Replace the method in ``transformers.integrations.peft`` where that is needed."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    mixin = module.__dict__.get("PeftAdapterMixin")
    if mixin is not None and version < ASKS:
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
    **kwargs: Any,
) -> LoadReport:
    """Load an adapter into a model of transformers, in place; the arguments are transformers'.

    Raises:
        FileError: the folder does not fit.
        StateError: nothing says what to load, or the name is taken.
    """
    name = adapter_name or "default"
    options = {k: v for k, v in kwargs.items() if k in (*HUB_OPTIONS, "subfolder")}
    options |= {"local_files_only": True} if local_files_only else {}
    options |= adapter_kwargs or {}
    if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
        raise StateError("give peft_model_id, or both peft_config and adapter_state_dict")
    config = peft_config or PeftConfig.from_pretrained(str(peft_model_id), **options)
    if isinstance(config, Mapping):
        config = PeftConfig.from_peft_type(**config)
    config.inference_mode = not is_trainable
    tensors = adapter_state_dict or load_peft_weights(str(peft_model_id), **options)
    known = getattr(self, "peft_config", {}) if self._hf_peft_config_loaded else {}
    if name not in known or hotswap in (False, "auto"):
        inject_adapter_in_model(config, self, name)
    self._hf_peft_config_loaded = True
    report = set_peft_model_state_dict(self, tensors, name)
    if not is_trainable:
        self.eval()
    return report
