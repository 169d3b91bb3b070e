"""PeftModel: a model with adapters, with PEFT's names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import PeftConfig, PeftType, TaskType
from ..engine.inject import switch_of
from ..engine.root import Grafted
from ..engine.tree import walk
from ..errors import POLICY, StateError, warn
from ..fast.shards import gathers, rank
from . import layer as _layer  # noqa: F401 - gives hosts PEFT's names
from . import scales as _scales  # noqa: F401
from .canary import arm
from .merging import Merging
from .report import Reports
from .updating import Updating

if TYPE_CHECKING:
    from ..files.codec import LoadReport


class PeftModel(Reports, Merging, Updating):
    """A model with adapters.

    Args:
        model: the model to adapt; its layers get hosts around them, in place.
        peft_config: the first adapter's config; a copy is kept.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters in fp32 where the model is in fp16 or bf16.
        low_cpu_mem_usage: leave the adapter on the meta device, for a file that follows.

    Raises:
        StateError: the model has adapters already; use ``add_adapter`` or ``load_adapter``.
    """

    TASK: TaskType | None = None
    base_model: Grafted

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        from ..interop.transformers import checkpointing, recognise

        super().__init__()
        model = _unwrapped(model, adapter_name)
        checkpointed = checkpointing(model)
        peft_config = copy(peft_config)
        peft_config.task_type = peft_config.task_type or self.TASK
        if peft_config.task_type is None and peft_config.auto_mapping is None:
            kind = type(model)
            peft_config.auto_mapping = {
                "base_model_class": kind.__name__,
                "parent_library": kind.__module__,
            }
        self.base_model = Grafted(
            model,
            peft_config,
            adapter_name,
            low_cpu_mem_usage,
            autocast=autocast_adapter_dtype,
            **options,
        )
        self.config = getattr(model, "config", {"model_type": "custom"})
        self.training = self.base_model.training = model.training
        if checkpointed:  # let gradients flow out of frozen embeddings
            model.enable_input_require_grads()  # type: ignore[operator]
        recognise()

    @classmethod
    def around(cls, model: nn.Module) -> PeftModel:
        """The wrapper around a model that has adapters already."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.base_model = Grafted.around(model)
        self.config = getattr(model, "config", {"model_type": "custom"})
        self.training = self.base_model.training = model.training
        return self

    # -- state

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.switch.configs

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        switch = self.base_model.switch
        switch.configs = value
        for name, config in list(value.items()):
            switch.take(name, config)

    @property
    def peft_type(self) -> str | PeftType | None:
        return self.active_peft_config.peft_type

    @property
    def active_adapters(self) -> list[str]:
        return list(self.base_model.switch.active)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        names = self.active_adapters or list(self.peft_config)
        if not names:
            raise StateError(
                "this model has no adapter any more; add one with add_adapter('default', "
                "LoraConfig(r=8))"
            )
        return self.peft_config[names[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        found = {
            m
            for config in self.peft_config.values()
            for m in getattr(config, "modules_to_save", None) or ()
        }
        return found or None

    @property
    def prefix(self) -> str:
        """What the names of adapters' parameters have in them, as ``lora_`` in PEFT."""
        return getattr(type(self.base_model), "prefix", ".adapters.")

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.base_model.switch.enabled and bool(self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The user's model, with the hosts in it."""
        model: nn.Module = self.base_model.model
        return model

    # -- calling

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward; ``adapter_names`` gives each row of the batch its own adapter."""
        return self.base_model(*args, adapter_names=adapter_names, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The model's ``generate``; ``adapter_names``: an adapter for each row of the batch."""
        model: Any = self.get_base_model()
        inputs = args or tuple(
            kwargs[k] for k in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(k) is not None
        )
        with self.base_model.generating(adapter_names, inputs, kwargs):
            return model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, in this thread, the model is the base model."""
        with self.base_model.using():
            yield

    # -- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> None:
        """Add one more adapter, of any method; ``set_adapter`` makes it active.

        Raises:
            StateError: the name is taken, or adapters are merged.
        """
        peft_config = copy(peft_config)
        peft_config.base_model_name_or_path = (
            peft_config.base_model_name_or_path or self._base_name()
        )
        self.base_model.add_adapter(
            adapter_name, peft_config, low_cpu_mem_usage, autocast=autocast_adapter_dtype, **options
        )

    def _base_name(self) -> str | None:
        return next((c.base_model_name_or_path for c in self.peft_config.values()), None)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active, the lowest first; unless ``inference_mode``, they alone train."""
        self.base_model.set_adapter(adapter_name, inference_mode)
        if not inference_mode:
            arm(self.base_model.model, self.base_model.switch)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Drop adapters."""
        self.base_model.delete_adapter(adapter_name)

    # -- files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        compat: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters: ``default`` into the folder, others into folders of their names. No
        network is asked.

        Args:
            save_directory: where to.
            safe_serialization: PEFT's option; the format is always safetensors.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: also the base's embeddings; "auto": where the adapter or the
                vocabulary changed them.
            is_main_process: False writes nothing. Where processes hold the model in parts and no
                state dict is given, all of them have to call this, and the first one writes.
            path_initial_model_for_weight_conversion: anything but None writes an adapter that
                starts from the base weight (PiSSA, OLoRA) as a plain LoRA of twice the rank, for
                the untouched base.
            compat: "peft" writes what PEFT can read also where the method is not one of its own:
                P_TUNING_V2 as PREFIX_TUNING.
            **kwargs: ``state_dict``: the model's gathered tensors.

        Raises:
            FileError: the folder cannot be written.
            ValueError: PEFT has no method that does the same.
        """
        if compat not in (None, "peft"):
            raise ValueError(f"compat={compat!r} is not known; it is 'peft', or left out")
        if not safe_serialization:
            text = "pickle files are not written; safe_serialization=False"
            if not POLICY.lenient:
                raise ValueError(f"{text} is refused. Leave it out")
            warn(f"{text} writes safetensors")
        values = kwargs.get("state_dict")
        together = values is None and gathers(self)
        if is_main_process or together:
            from . import storage

            plain = path_initial_model_for_weight_conversion is not None
            writes = is_main_process and not (together and rank())
            options = save_embedding_layers, plain, values, compat, writes
            with self.base_model.switch.turns.change():
                storage.save(self, save_directory, selected_adapters, *options)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter into a model.

        Args:
            model: the base model.
            model_id: the adapter's folder or hub id.
            adapter_name: the name that it gets.
            is_trainable: whether it will be trained on.
            config: used instead of the folder's config.
            autocast_adapter_dtype: keep the adapter in fp32 where the model is in fp16 or bf16.
            ephemeral_gpu_offload: not available.
            low_cpu_mem_usage: PEFT's option; a file's tensors are never initialised first.
            key_mapping: regex -> replacement for the names of a model that was built otherwise.
            **kwargs: ``strict="warn"`` to load what fits, ``allow_pickle=True`` to read
                ``adapter_model.bin``, and the hub's ``subfolder``, ``revision``, ``token``,
                ``cache_dir``, ``local_files_only``.

        Raises:
            FileError: the folder or a tensor in it does not fit; the model is as it was.
        """
        from . import loading
        from .tasks import class_for

        _refuse_offload(ephemeral_gpu_offload)
        loader = loading.Loader(model_id, config, is_trainable, key_mapping, kwargs)
        wanted = cls if cls is not PeftModel else class_for(loader.config)
        fresh, options = switch_of(model) is None, (adapter_name, autocast_adapter_dtype)

        def put() -> PeftModel:
            return wanted(model, loader.config, *options, start=False)

        def drop(placed: PeftModel) -> None:
            placed.base_model.unload() if fresh else placed.delete_adapter(adapter_name)

        peft_model: PeftModel = loader.bring(model, adapter_name, put, drop)[0]
        if not is_trainable:
            peft_model.eval()
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Load one more adapter, or the values of one that is there, and tell what was loaded.

        Raises:
            FileError: the folder or a tensor in it does not fit; the model is as it was.
        """
        from . import loading

        _refuse_offload(ephemeral_gpu_offload)
        loader = loading.Loader(model_id, None, is_trainable, key_mapping, kwargs)
        found = loader.one_more(self, adapter_name, autocast_adapter_dtype)
        if not is_trainable and any(m.training for _, m in walk(self)):
            with self.base_model.switch.turns.change(None):
                self.eval()  # which visits every part of every adapter
        return found

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the adapters to the hub."""
        from .card import push

        return push(self, repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write or complete the folder's ``README.md``."""
        from .card import model_card

        model_card(output_dir, self.active_peft_config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)


def _unwrapped(model: nn.Module, adapter_name: str) -> nn.Module:
    """The plain model; wrapping it twice is an error, since both would share its layers."""
    switch = switch_of(model.get_base_model() if isinstance(model, PeftModel) else model)
    if switch is None:
        return model
    text = (
        f"this model already has the adapters {sorted(switch.configs)}, and they live in the model "
        f"itself. Use model.add_adapter({adapter_name!r}, config) or model.load_adapter(folder, "
        "name) for one more, or go on with model.unload()"
    )
    if not POLICY.lenient:
        raise StateError(text)
    warn(
        f"You are trying to modify a model with PEFT for a second time: {text}. The new adapter "
        "is added to them"
    )
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name in switch.configs:
        from ..engine.inject import delete

        delete(model, switch, (adapter_name,))
    return model


def _refuse_offload(wanted: bool) -> None:
    if wanted:
        raise ValueError(
            "ephemeral_gpu_offload is not available: adapters stay where their layer is. Leave it "
            "out"
        )
