"""What changes in this library's classes under ``as_peft()``: they show PEFT's names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ..config import PeftConfig
from ..engine.host import Host
from ..engine.root import Grafted
from ..errors import StateError
from ..model.functional import get_peft_model_state_dict
from ..model.peft_model import PeftModel
from ..parts.companions import HEADS
from . import attributes, shown, status
from .classes import class_name
from .tuners import BaseTuner, tuner


class _Names(tuple[str, ...]):
    """The merged adapters: PEFT has a list, which programs compare with one."""

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, list) else other)

    __hash__ = tuple.__hash__


def install() -> None:
    """Show PEFT's names from now on."""
    shown.install()
    attributes.install()
    setattr(Host, "_get_name", class_name)  # noqa: B010 - mypy knows Module's
    Host.merged_adapters = property(_merged, _set_merged)  # type: ignore[assignment]
    PeftModel.get_layer_status = status.get_layer_status  # type: ignore[assignment,method-assign]
    PeftModel.get_model_status = status.get_model_status  # type: ignore[assignment,method-assign]
    PeftModel.add_weighted_adapter = _unless_there(PeftModel.add_weighted_adapter)  # type: ignore[method-assign]
    PeftModel.modules_to_save = property(_modules_to_save)  # type: ignore[method-assign,assignment]
    for function in ADDED:
        setattr(PeftModel, function.__name__, function)
    PeftConfig.check_kwargs = classmethod(_checked)  # type: ignore[attr-defined]
    PeftConfig.push_to_hub = push_to_hub  # type: ignore[attr-defined]
    Grafted.__init__ = _classed(Grafted.__init__)  # type: ignore[method-assign]
    Grafted.around = classmethod(_around(Grafted.around.__func__))  # type: ignore[assignment,attr-defined]


def _merged(host: Host) -> _Names:
    return _Names(host.__dict__["merged_adapters"])


def _set_merged(host: Host, names: tuple[str, ...]) -> None:
    host.__dict__["merged_adapters"] = tuple(names)


def _unless_there(made: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(made)
    def add_weighted_adapter(
        self: PeftModel, adapters: Any, weights: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Nothing where the new name is there, as in PEFT."""
        if adapter_name in self.peft_config:
            return None
        return made(self, adapters, weights, adapter_name, *args, **kwargs)

    return add_weighted_adapter


def _modules_to_save(model: PeftModel) -> set[str] | None:
    """What adapters train whole, and the names of heads that PEFT looks for."""
    found = {
        m for c in model.peft_config.values() for m in getattr(c, "modules_to_save", None) or ()
    }
    for config in model.peft_config.values():
        found |= {*HEADS.get(getattr(config.task_type, "value", ""), ())}
    return found or None


def get_prompt_embedding_to_save(model: PeftModel, adapter_name: str) -> Tensor:
    """The rows of a prompt, (virtual tokens, size), as a file has them."""
    return get_peft_model_state_dict(model, adapter_name=adapter_name)["prompt_embeddings"]


def get_prompt(
    model: PeftModel, batch_size: int, task_ids: Any = None, max_cache_len: int | None = None
) -> Tensor:
    """The rows of the active prompt for each row of a batch, (batch, virtual tokens, size).

    Raises:
        StateError: the active adapter is no prompt of rows.
    """
    config = model.active_peft_config
    if config.method not in ("PROMPT_TUNING", "P_TUNING"):
        raise StateError(
            f"a {config.method} adapter has no rows that are the same for every input; call the "
            "model, or take get_peft_model_state_dict(model)"
        )
    rows = get_prompt_embedding_to_save(model, model.active_adapters[0])
    return rows[None].expand(batch_size, *rows.shape)


def set_requires_grad(
    model: PeftModel, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Freeze or unfreeze adapters, whether active or not."""
    model.base_model.set_requires_grad(adapter_names, requires_grad)


def supports_lora_conversion(model: PeftModel, adapter_name: str = "default") -> bool:
    """Whether every part of an adapter is an update of a weight."""
    found: bool = model.base_model.supports_lora_conversion(adapter_name)
    return found


def prepare_model_for_gradient_checkpointing(model: PeftModel, inner: Any) -> Any:
    """Let gradients flow out of a model's frozen embeddings."""
    if hasattr(inner, "enable_input_require_grads"):
        inner.enable_input_require_grads()
    return inner


ADDED = (
    get_prompt,
    get_prompt_embedding_to_save,
    set_requires_grad,
    supports_lora_conversion,
    prepare_model_for_gradient_checkpointing,
)


def _checked(cls: type[PeftConfig], /, **kwargs: Any) -> dict[str, Any]:
    """PEFT's place for what a file's fields mean; here the fields themselves say it."""
    return kwargs


def push_to_hub(config: PeftConfig, repo_id: str, **kwargs: Any) -> Any:
    """Upload the config to the hub."""
    from huggingface_hub import HfApi

    own = {k: kwargs.pop(k) for k in ("token", "private") if k in kwargs}
    api = HfApi(token=own.get("token"))
    repo_id = api.create_repo(repo_id, private=own.get("private"), exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


def _classed(made: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(made)
    def classed(self: Grafted, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _become(self)

    return classed


def _around(made: Callable[..., Grafted]) -> Callable[..., Grafted]:
    def around(cls: type[Grafted], model: Any) -> Grafted:
        self = made(cls, model)
        _become(self)
        return self

    return around


def _become(root: Grafted) -> None:
    """A root is of the class that PEFT has for its first adapter."""
    first = next(iter(root.switch.configs.values()), None)
    if first is not None and not isinstance(root, BaseTuner):
        root.__class__ = tuner(first.method)
