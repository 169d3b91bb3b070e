"""The identity of a base model: enough to notice that an adapter meets another base."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.tree import parameters
from ..fast.shards import class_of, shape_of, split

SAMPLED = 16  # weights that are sampled
POINTS = 64  # numbers taken from each of them
FLEETING = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "tie_word_embeddings",
    "problem_type",  # classifiers conclude it from the first labels that they see
    *("pad_token_id", "bos_token_id", "eos_token_id"),  # a Trainer takes them from the tokenizer
}


def identity(model: nn.Module, grown: Collection[str] = ()) -> dict[str, Any]:
    """The model's class, a digest of its config and of its shapes, and hashes of sampled weights.

    The samples are rounded to bf16, so that one base in two precisions is the same base.

    Args:
        model: the user's model.
        grown: names of tables with rows that the base did not have, which are not sampled.
    """
    found = _identity(model, dict(parameters(model)))
    weights = {name: digest for name, digest in found["weights"].items() if name not in grown}
    return {**found, "weights": weights}


def _identity(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Any]:
    named = list(parameters.items())
    shapes = {name: list(shape_of(p)) for name, p in named}
    weights = [(name, p) for name, p in named if p.ndim > 1 and _readable(p)]
    chosen = weights[:: max(1, len(weights) // SAMPLED)][:SAMPLED]
    return {
        "class": class_of(model).__name__,
        "config": _digest(_config(model)),
        "shapes": _digest(shapes),
        "weights": {name: sample(p) for name, p in chosen},
    }


def _readable(weight: Tensor) -> bool:
    """Whether this process alone can look at a weight's numbers."""
    return weight.is_floating_point() and not weight.is_meta and split(weight) is None


def sample(weight: Tensor) -> str:
    """A hash of some numbers of a weight."""
    flat = weight.detach().reshape(-1)
    points = torch.linspace(
        0, flat.numel() - 1, min(POINTS, flat.numel()), dtype=torch.float64
    ).long()
    values = flat[points.to(flat.device)].to(torch.bfloat16).float().cpu()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def checked(saved: Any) -> dict[str, Any]:
    """An identity that a file holds; empty where it is none."""
    texts = ("class", "config", "shapes")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), str) for key in texts):
        return {}
    weights = saved.get("weights")
    whole = isinstance(weights, dict) and all(isinstance(v, str) for v in weights.values())
    return {**{key: saved[key] for key in texts}, "weights": weights if whole else {}}


def differences(model: nn.Module, saved: dict[str, Any]) -> list[str]:
    """What differs between a model and a saved identity, in words; empty for the same base."""
    here = dict(parameters(model))
    now = _identity(model, here)
    out = []
    if now["class"] != saved.get("class"):
        out.append(
            f"the class: {now['class']} here, {saved.get('class')} when the adapter was saved"
        )
    if now["shapes"] != saved.get("shapes"):
        out.append("the names or shapes of the weights")
    elif now["config"] != saved.get("config"):
        out.append("the model's config")
    weights = {
        name: digest
        for name, digest in saved.get("weights", {}).items()
        if name in here and _readable(here[name])
    }
    digests = {**{n: sample(here[n]) for n in weights if n not in now["weights"]}, **now["weights"]}
    other = [name for name, digest in weights.items() if digests[name] != digest]
    if other:
        out.append(
            f"the values of {len(other)} of {len(saved['weights'])} sampled weights, e.g. "
            f"{other[0]}"
        )
    return out


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", {})
    if hasattr(config, "to_dict"):
        return _lasting(config.to_dict())
    plain = isinstance(config, Mapping)  # a model of one's own may have any object there
    return _lasting(dict(config) if plain else dict(getattr(config, "__dict__", {})))


def _lasting(data: dict[Any, Any]) -> dict[Any, Any]:
    """What the base is known by; dropout matters in training alone."""
    kept = {k: v for k, v in data.items() if k not in FLEETING and "drop" not in str(k)}
    return {k: _lasting(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=_named)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(value: Any) -> str:
    """A value that JSON does not have, without its address, which another process does not have."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
