"""LoRA+ (arXiv 2402.12354): B learns at a multiple of A's rate."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..engine.adapter import Part

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
    fast, decay = lr * loraplus_lr_ratio, loraplus_weight_decay
    kinds = (lr, decay), (loraplus_lr_embedding, decay), (fast, decay), (fast, 0.0)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": d, "lr": r} for r, d in kinds]
    of_a, of_embeddings, of_b, undecayed = (group["params"] for group in groups)
    owned = [(module, *one) for module in model.modules() for one in module._parameters.items()]
    names = {id(p): m.keys.get(n, n) for m, n, p in owned if isinstance(m, Part)}  # in files
    # biases and the gains of norms, which weight decay would pull to zero
    still = {id(p) for m, n, p in owned if n == "bias" or "norm" in type(m).__name__.lower()}
    for p in (p for p in model.parameters() if p.requires_grad):
        name = names.get(id(p), "")
        if name.startswith("lora_embedding"):
            of_embeddings.append(p)
        elif name.startswith("lora_B") or p.ndim == 1:
            (undecayed if id(p) in still or "bias" in name else of_b).append(p)
        else:
            of_a.append(p)
    if not any(group["params"] for group in groups):
        raise ValueError("no tensor of this model trains; attach an adapter, or set_adapter one")
    optimizer = optimizer_cls(groups, **kwargs)
    if optimizer_cls.__name__ in EIGHT_BITS:
        _embeddings_in_full(model)
    return optimizer


def _embeddings_in_full(model: nn.Module) -> None:
    """bitsandbytes keeps the state of embeddings in 32 bits where it is told to."""
    import bitsandbytes  # type: ignore[import-not-found,unused-ignore]

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
