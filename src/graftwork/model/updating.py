"""What can be done with trained adapters: combine them, convert, resize, swap; and LoRA out of a
fine-tuned model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..engine.inject import delete
from ..engine.root import Grafted
from ..errors import POLICY, StateError

if TYPE_CHECKING:
    from ..files.codec import LoadReport
    from ..updates.convert import Conversion


class Updating(nn.Module):
    """The verbs of a ``PeftModel`` about updates, as its methods."""

    base_model: Grafted

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        energy: float | None = None,
        compat: str | None = None,
    ) -> dict[str, float]:
        """Add a LoRA that combines adapters of any methods, or a prompt of prompts; not active.

        Args:
            adapters: their names.
            weights: one for each; negative ones take an adapter's effect away.
            adapter_name: the name of the new one.
            combination_type: "linear", "cat" (linear, of the full rank), "svd" (linear, with a
                rank), "ties", "dare_linear", "dare_ties", "magnitude_prune": of the updates, in
                factored form, or PEFT's names with ``_svd``. Of prompts "cat", the rows of all, or
                "linear", the weighted sum of the rows.
            svd_rank: at most so many directions; for "svd" by default the adapters' largest rank.
            svd_clamp: PEFT's option, which is not available.
            svd_full_matrices: PEFT's option, without effect on the result.
            svd_driver: PEFT's option, without effect on the result.
            density: the share of the numbers that ties, dare and magnitude_prune keep.
            majority_sign_method: how TIES elects a sign, "total" or "frequency".
            energy: the fewest directions that hold this share of the squared norm.
            compat: "peft": PEFT's rules, on the factors; the default under ``as_peft()``.

        Returns:
            Place -> the share of the combined update that a smaller rank leaves out.

        Raises:
            StateError: the request makes no sense, or these adapters cannot be one.
        """
        from ..updates.combine import combine

        if svd_clamp is not None:
            raise ValueError("svd_clamp is not available: it distorts the update. Leave it out")
        root, rule = self.base_model, compat or ("peft" if POLICY.lenient else None)
        rank, sign, how = svd_rank, majority_sign_method, combination_type
        options = adapter_name, how, rank, energy, density, sign, rule
        with root.switch.change(adapter_name):
            return combine(root.model, root.switch, adapters, weights, *options)

    def to_lora(
        self,
        adapter_name: str,
        new_name: str,
        rank: int | float | None = None,
        energy: float | None = None,
    ) -> Conversion:
        """Add a LoRA that does what an adapter of any method does; it is not active.

        Args:
            adapter_name: the adapter.
            new_name: the name of the LoRA.
            rank: at most so many directions; below one: a share of the energy, as in PEFT. By
                default as many as the update has.
            energy: the fewest directions that hold this share of the squared norm.

        Returns:
            What the rank leaves out, place by place.

        Raises:
            StateError: the adapter is no update of weights.
        """
        from ..updates.convert import to_lora

        root = self.base_model
        with root.switch.change(new_name):
            return to_lora(root.model, root.switch, adapter_name, new_name, rank, energy)

    def resize_adapter(
        self, adapter_name: str, rank: int | float | None = None, energy: float | None = None
    ) -> Conversion:
        """Make an adapter a LoRA of another rank, under its own name.

        Args:
            adapter_name: the adapter.
            rank: at most so many directions.
            energy: the fewest directions that hold this share of the squared norm.
        """
        root = self.base_model
        if rank is None and energy is None:
            raise ValueError("give rank= or energy=")
        with root.switch.turns.change(None):
            active, new = root.switch.active, f"{adapter_name}-resized"
            done = self.to_lora(adapter_name, new, rank, energy)
            others = tuple(n for n in active if n != adapter_name)
            root.switch.activate(others or (new,))
            delete(root.model, root.switch, (adapter_name,))
            root.rename_adapter(new, adapter_name)
            root.switch.activate(active)
        return done

    def hotswap_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
    ) -> LoadReport:
        """Put another adapter's values in the place of one that is there.

        Args:
            model_id: the other adapter's folder or hub id.
            adapter_name: the adapter that is there.
            **kwargs: as for ``load_adapter``.

        Raises:
            StateError: what differs is no tensor data.
            FileError: the folder does not fit.
        """
        return hotswap_adapter(self, model_id, adapter_name, **kwargs)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> LoadReport:
    """``PeftModel.hotswap_adapter`` for any model with adapters."""
    from .loading import Loader

    loader = Loader(model_name_or_path, None, False, None, kwargs)
    return _swap(model, adapter_name, loader.config, loader.tensors, str(loader.source))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> LoadReport:
    """Hot-swap from tensors under the names in files, or PEFT's names in memory, which have the
    adapter's in them; the last argument is PEFT's.
    """
    from ..files import codec
    from . import functional

    plain = {}
    for owned in codec.owned(functional.user_model(model), adapter_name):
        for key in owned.expects:
            first, dot, rest = key.partition(".")
            plain[f"{owned.front}{first}.{adapter_name}{dot}{rest}"] = owned.front + key
    tensors = {plain.get(k.removeprefix(codec.PREFIX), k): t for k, t in state_dict.items()}
    return _swap(model, adapter_name, config, tensors, "the state dict")


def _swap(
    model: nn.Module, name: str, config: Any, tensors: dict[str, Tensor], where: str
) -> LoadReport:
    from ..updates.hotswap import swap
    from . import functional

    switch = functional.switch_of(model)
    with switch.change(name):
        return swap(functional.user_model(model), switch, name, config, tensors, where)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: str = "error",
) -> None:
    """Make room for other adapters before compiling: ranks up to ``target_rank``, any scale.

    Args:
        model: a model with adapters.
        target_rank: the largest rank that will be swapped in.
        config: PEFT's option, not needed.
        check_compiled: "error", "warn" or "ignore" where the model is compiled already.
    """
    from ..updates.hotswap import prepare
    from . import functional

    prepare(functional.user_model(model), target_rank, check_compiled)


def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | float | None = None,
    energy: float | None = None,
    adapter_name: str = "default",
) -> Any:
    """A LoRA out of a full fine-tune: what it changed, on the base model.

    Args:
        base: the model that was fine-tuned; it gets the adapter.
        tuned: the fine-tuned model.
        rank: at most so many directions; by default as many as the change has.
        energy: the fewest directions that hold this share of the squared norm.
        adapter_name: the adapter's name.

    Returns:
        The ``PeftModel`` and a ``Conversion``: what the rank leaves out. Modules whose other
        tensors changed (norms, biases) are saved as a whole.

    Raises:
        StateError: the models differ in more than values, or not at all.
    """
    from ..engine.switch import Switch
    from ..methods.lora_config import LoraConfig
    from ..updates.convert import differences
    from ..updates.sites import Updates, insert
    from ..updates.whole import Trained
    from .peft_model import PeftModel

    updates, left, done = differences(base, tuned, rank, energy)
    if not updates:
        raise StateError("no matrix differs between the two models, so there is no LoRA in it")
    modules = {name.rpartition(".")[0] for name in left} - {place.path for place in updates}
    if lost := [n for n in left if n.rpartition(".")[0] not in modules]:
        raise StateError(
            f"the biases of adapted layers changed too, e.g. {lost[0]}; LoRA of PEFT's kind cannot "
            "hold that beside a matrix: set them back, or train without biases"
        )
    own, theirs = dict(base.named_modules()), dict(tuned.named_modules())
    whole = {
        (path, "copy"): Trained(theirs[path].state_dict(), own[path].state_dict())
        for path in sorted(modules)
    }
    switch = Switch()
    insert(base, switch, adapter_name, updates, [Updates(LoraConfig(), whole=whole)])
    switch.activate((adapter_name,))
    return PeftModel.around(base), done


def convert_to_lora(
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's name: an adapter of any method as a LoRA's config and tensors; the model is as it was.

    Args:
        model: a ``PeftModel``.
        rank: at most so many directions; below one: a share of the energy.
        adapter_name: the adapter.
        progressbar: PEFT's option.
        compile_kwargs: PEFT's option.
    """
    from . import functional

    name = f"{adapter_name}-as-lora"
    model.to_lora(adapter_name, name, rank)
    try:
        tensors = functional.get_peft_model_state_dict(model, adapter_name=name)
        config = model.peft_config[name]
    finally:
        model.base_model.delete_adapter(name)
    return config, {key: tensor.clone() for key, tensor in tensors.items()}


def save_as_lora(
    path: str | os.PathLike[str],
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """PEFT's name: write an adapter of any method as a LoRA; see ``convert_to_lora``."""
    from pathlib import Path

    from ..files import identity
    from ..files.folder import write

    config, tensors = convert_to_lora(model, rank, adapter_name)
    note = {"identity": identity.identity(model.get_base_model())}
    with torch.no_grad():
        write(Path(path), config, tensors, note, {})
