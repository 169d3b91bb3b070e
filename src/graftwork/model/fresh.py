"""What of a model is wrong before its first training step: a head of random numbers that nobody
trains, and statistics that change without being saved.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.host import Host
from ..engine.tree import inside, walk

KNOWN = "_is_hf_initialized"  # transformers' mark on a parameter that came from a checkpoint


def untrained_heads(model: nn.Module, names: tuple[str, ...]) -> str | None:
    """Says which head is not from the checkpoint, while no adapter among ``names`` replaces it and
    it does not train by itself; None where all is well, or nothing came from a checkpoint.
    """
    body: Any = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(body, nn.Module) or body is model:
        return None
    known = {id(p): hasattr(p, KNOWN) for p in body.parameters()}
    if not any(known.values()):
        return None
    ends = _ends(model)
    found: list[str] = []
    for path, module in _own(model, names):
        own = [p for p in inside(module)._parameters.values() if p is not None]
        new = [p for p in own if id(p) not in known and not hasattr(p, KNOWN)]
        if inside(module) not in ends and any(not p.requires_grad for p in new):
            found.append(path)
    if not found:
        return None
    heads = sorted({path.partition(".")[0] for path in found})
    return (
        f"{', '.join(heads)} of this {type(model).__name__} is not in the checkpoint that it was "
        "loaded from, so it holds random numbers, and the adapter neither trains nor saves it. "
        f'Give the config task_type="SEQ_CLS", or that of your task, or modules_to_save={heads}'
    )


def running_statistics(model: nn.Module, names: tuple[str, ...]) -> str | None:
    """Says which layers of a frozen model go on with their running statistics; None: none does."""
    found = [
        (path, type(inside(module)).__name__)
        for path, module in _own(model, names)
        if inside(module).training
        and inside(module)._buffers.get("running_mean") is not None
        and not any(p.requires_grad for p in inside(module).parameters(recurse=False))
    ]
    if not found:
        return None
    (path, kind), more = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{path}{more}, a {kind}, changes its running statistics while the model is in train(), "
        "and no adapter saves them, so that the base model would be another one after training. "
        "Put such layers in eval() after model.train(), or name them in modules_to_save"
    )


def _own(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """The modules that run as they are: no copy stands in for them or for one around them."""
    every, left = list(walk(model)), []
    instead: tuple[str, ...] = ()
    for path, module in every:
        if isinstance(module, Host) and any(part.replaces for part in module.parts(names)):
            instead = (*instead, f"{path}.")
        if not f"{path}.".startswith(instead or ("\n",)):
            left.append((path, module))
    return left


def _ends(model: Any) -> list[nn.Module]:
    """The ends of the vocabulary, which new tokens make anew out of what was in the checkpoint."""
    ends = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            continue
        ends += [inside(end)] if isinstance(end, nn.Module) else []
    return ends
