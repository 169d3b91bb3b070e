"""PEFT's tuners, ``model.base_model``: the root of a model is of the class that PEFT has for its
first adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..engine.module import PARAM
from ..engine.root import Grafted
from ..errors import StateError, warn
from ..table import METHODS
from ..targets.defaults import TARGETS
from .classes import BaseTunerLayer, at_parameters, layer_class, methods_at
from .facts import LAYER_NAMES, prefix_of


class BaseTuner(Grafted):
    """PEFT's names on the root of a model with adapters."""

    prefix: str = ""
    tuner_layer_cls: Any = BaseTunerLayer
    target_module_mapping: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """``(model, config, adapter_name)``; the config is ``peft_config`` in some of PEFT's."""
        if "config" in kwargs:
            kwargs["peft_config"] = kwargs.pop("config")
        kwargs.pop("state_dict", None)
        super().__init__(*args, **kwargs)

    @property
    def active_adapter(self) -> str | list[str]:  # type: ignore[override]
        """The active adapter, or a list where it is not just one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        """The layers in which a method acts."""
        return [
            path
            for path, host in self.hosts().items()
            if methods_at(host) and not at_parameters(host)
        ]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The bare parameters at which a method acts."""
        found = []
        for path, host in self.hosts().items():
            for name in host.adapters if at_parameters(host) else ():
                keys = [k.removeprefix(PARAM).replace(":", ".") for k, _ in host.parts_of(name)]
                found += [f"{path}.{key}" for key in keys if f"{path}.{key}" not in found]
        return found

    @property
    def uses_shared_state(self) -> bool:
        """Whether the layers of an adapter have tensors in common."""
        return bool(self.switch.shared)

    @staticmethod
    def get_model_config(model: Any) -> Any:
        """The model's config as a dictionary."""
        config = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else config

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off; none trains until ``enable_adapter_layers``."""
        super().disable_adapter_layers()
        self.set_requires_grad(list(self.switch.configs), False)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again; the active ones train."""
        super().enable_adapter_layers()
        if self.switch.active:
            self.set_adapter(self.switch.active)

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        keep: bool | str = True,
    ) -> None:
        """Write adapters into the weights; beside merged ones with PEFT's warning."""
        held = self.merged()
        wanted = self.switch.check(tuple(adapter_names) if adapter_names else self.switch.active)
        new = [name for name in wanted if name not in held]
        if held and new:
            warn(
                f"Already following adapters were merged {','.join(sorted(held))}. You are now "
                f"additionally merging {','.join(new)}.",
                UserWarning,
            )
        super().merge_adapter(adapter_names, safe_merge, keep)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every part of an adapter is an update of a weight."""
        every = [p for h in self.hosts().values() for _, p in h.parts_of(adapter_name)]
        return bool(every) and not any("merge" in part.FORBIDS for part in every)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """What ``PeftModel.add_weighted_adapter`` does."""
        from ..model.peft_model import PeftModel

        here: Any = SimpleNamespace(base_model=self, peft_config=self.peft_config)
        return PeftModel.add_weighted_adapter(here, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        """Add the adapter of ``peft_config[adapter_name]`` to the model.

        Raises:
            StateError: it is there already; ``add_adapter(name, config)`` adds another.
        """
        raise StateError(
            f"there is an adapter {adapter_name!r} already, since a config is taken in together "
            "with its adapter: add_adapter(name, config) adds another"
        )


class LycorisTuner(BaseTuner):
    """PEFT's base of LoHa's and LoKr's tuners."""


class MixedModel(BaseTuner):
    """PEFT's tuner of several methods; every model here may have them."""


@functools.cache
def tuner(method: str) -> type[BaseTuner]:
    """PEFT's class of a method's tuner."""
    stem = METHODS[method].config.__name__.removesuffix("Config")
    above: type[BaseTuner] = LycorisTuner if method in ("LOHA", "LOKR") else BaseTuner
    above = tuner("LORA") if method == "ADALORA" else above
    first = LAYER_NAMES.get(method.lower(), [""])[0]
    return type(
        f"{stem}Model",
        (above,),
        {
            "__doc__": f"The root of a model whose first adapter is {stem}'s.",
            "__module__": f"peft.tuners.{method.lower()}.model",
            "prefix": prefix_of(method),
            "tuner_layer_cls": layer_class(method.lower(), first) if first else BaseTunerLayer,
            "target_module_mapping": dict(TARGETS.get(method, {})),
        },
    )


def __getattr__(name: str) -> Any:
    stem = name.removesuffix("Model")
    for method, row in METHODS.items() if name.endswith("Model") else ():
        if row.where.endswith(f":{stem}Config"):
            return tuner(method)
    raise AttributeError(name)
