"""LoRA+ (arXiv 2402.12354): B learns at a multiple of A's rate."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .pairs import names_in_files

EIGHT_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer in which B, and every trained vector, learns faster than A.

    Args:
        model: a model with adapters.
        optimizer_cls: any class of optimizers, also of bitsandbytes.
        lr: A's rate, and that of matrices that are trained as a whole.
        loraplus_lr_ratio: how many times faster the others learn; 16 is usual.
        loraplus_weight_decay: of all but biases and norms.
        loraplus_lr_embedding: the rate of LoRAs at embeddings.
        **kwargs: the class's own options.

    Raises:
        ValueError: the ratio is not positive, or nothing trains.
    """
    if loraplus_lr_ratio <= 0:
        raise ValueError(f"loraplus_lr_ratio={loraplus_lr_ratio} must be positive; try 16")
    fast = lr * loraplus_lr_ratio
    rates = {"A": lr, "embedding": loraplus_lr_embedding, "B": fast, "B without decay": fast}
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "weight_decay": loraplus_weight_decay, "lr": rate}
        for name, rate in rates.items()
    }
    groups["B without decay"]["weight_decay"] = 0.0
    keys, still = {id(p): key for p, key in names_in_files(model)}, _undecayed(model)
    for p in (p for p in model.parameters() if p.requires_grad):
        key = keys.get(id(p), "")
        if key.startswith("lora_embedding"):
            group = "embedding"
        elif key.startswith("lora_B") or p.ndim == 1:
            group = "B without decay" if id(p) in still or "bias" in key else "B"
        else:
            group = "A"
        groups[group]["params"].append(p)
    if not any(group["params"] for group in groups.values()):
        raise ValueError("no tensor of this model trains; attach an adapter, or set_adapter one")
    optimizer = optimizer_cls(list(groups.values()), **kwargs)
    if optimizer_cls.__name__ in EIGHT_BITS:
        _embeddings_in_full(model)
    return optimizer


def _undecayed(model: nn.Module) -> set[int]:
    """Biases and the gains of norms, which weight decay would pull to zero."""
    return {
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias" or "norm" in type(module).__name__.lower()
    }


def _embeddings_in_full(model: nn.Module) -> None:
    """bitsandbytes keeps the state of embeddings in 32 bits where it is told to."""
    import bitsandbytes  # type: ignore[import-not-found,unused-ignore]

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
