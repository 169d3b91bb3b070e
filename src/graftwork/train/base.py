"""The base model and its tokenizer, loaded quietly and checked."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import did_you_mean
from .recipe import RecipeError

SHORT = 128  # tokens; up to here plain attention trains faster on a CPU


def resolve(source: str) -> str:
    """A model's folder as an absolute path, or its hub id as it is.

    Raises:
        RecipeError: it looks like a folder that is not there, or is an adapter's.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise RecipeError(
                    f"--model: {source} is an adapter, not a base model; give the model that it "
                    "was trained on"
                )
            raise RecipeError(f"--model: {source} has no config.json, so it is no model's folder")
        return str(path.resolve())
    if path.exists():
        raise RecipeError(f"--model: {source} is a file; give the model's folder or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(
            f"--model: there is no folder {source}{did_you_mean(path.name, siblings)}"
        )
    return source


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Errors of loading, with what to do about them."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if Path(source).is_dir():
            text = str(error).strip().splitlines()[0]
            raise RecipeError(f"--model: {source} cannot be loaded: {text}") from error
        raise RecipeError(
            f"--model: there is no folder {source} here, and the hub does not give a model of that "
            "name: it is misspelt, private (log in with `hf auth login`), or there is no network. "
            f"({_reason(error)})"
        ) from error


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The model's tokenizer, with a padding token.

    Args:
        source: what ``resolve`` gave, or a folder that holds a tokenizer.
        revision: the revision on the hub.

    Raises:
        RecipeError: there is none, or it can pad with nothing.
    """
    import transformers

    with _explained(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"the tokenizer of {source} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def longest(tokenizer: Any, config: Any) -> int | None:
    """The longest sequence that a model takes, in tokens; None where it does not say."""
    told = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**6 else []
    positions = getattr(config, "max_position_embeddings", None)
    return min(
        [*told, *([positions] if isinstance(positions, int) and positions > 0 else [])],
        default=None,
    )


def model_class(kind: str, source: str, config: Any) -> type[Any]:
    """The class of a base model, without its weights.

    Args:
        kind: the class of transformers that chooses it.
        source: what ``resolve`` gave.
        config: the model's config.

    Raises:
        RecipeError: there is none for this config.
    """
    import transformers
    from accelerate import init_empty_weights

    with _explained(source), init_empty_weights():
        return type(getattr(transformers, kind).from_config(copy.deepcopy(config)))


def taken(method: Any, kind: type[Any]) -> int:
    """How many positions of a base model of this class a method's virtual tokens take."""
    known = inspect.signature(kind.forward).parameters
    return int(method.positions(known)) if method.is_prompt_learning else 0


def load_config(source: str, revision: str | None = None, **changes: Any) -> Any:
    """The model's config with some fields changed."""
    import transformers

    with _explained(source):
        return transformers.AutoConfig.from_pretrained(source, revision=revision, **changes)


def set_attention(config: Any, kernel: str) -> None:
    """Note a kernel in a model's config; ``auto`` leaves the choice to transformers."""
    if kernel != "auto":
        config._attn_implementation = kernel


def dropouts(config: Any) -> list[str]:
    """The fields of a model's config that are dropouts; skipped layers are something else."""
    names = [n for n, v in config.to_dict().items() if "drop" in n and type(v) in (int, float)]
    return [n for n in names if "layer" not in n]


def set_dropout(config: Any, share: float) -> None:
    """Change every dropout of a model in its config.

    Raises:
        RecipeError: the model has none.
    """
    names = dropouts(config)
    if not names:
        raise RecipeError(f"--base-dropout: a {config.model_type} has no dropout; leave it out")
    for name in names:
        setattr(config, name, float(share))


def choose_attention(wanted: str, longest: int) -> str:
    """The kernel of a model's attention; ``auto`` becomes what trains fastest on this machine.

    On a CPU, the fused kernel's backward pass is slower than plain products where sequences are
    short (benchmarks/attention.py); elsewhere it stays ``auto``, which is transformers' choice.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return "eager" if wanted == "auto" and not accelerated and longest <= SHORT else wanted


def load_model(
    kind: str, source: str, config: Any, precision: str, revision: str | None, seed: int
) -> tuple[Any, list[str]]:
    """The base model on the CPU, and those of its modules that start anew.

    Args:
        kind: the class of transformers that loads it.
        source: what ``resolve`` gave.
        config: the model's config.
        precision: ``fp32`` loads in fp32, anything else in the files' own type.
        revision: the revision on the hub.
        seed: decides what starts from noise, such as a new head.

    Raises:
        RecipeError: it cannot be loaded.
    """
    import transformers

    transformers.set_seed(seed)
    dtype = torch.float32 if precision == "fp32" else "auto"
    with _explained(source):
        model, info = getattr(transformers, kind).from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # another head than the one that is wanted; see below
            output_loading_info=True,
        )
    if model.dtype == torch.float16 and not torch.cuda.is_available():
        model = model.float()  # half precision is for accelerators
    new = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    missing = {name.rpartition(".")[0] for name in new}
    return model, sorted(missing)


def choose_precision(wanted: str) -> str:
    """``auto`` becomes what this machine computes fastest without losing its way."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    tell = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.7 does not tell yet
    abilities: dict[str, Any] = tell()
    fast = abilities.get("amx_bf16") or abilities.get("avx512_bf16")
    return "bf16" if fast else "fp32"


def rounding(model: Any) -> float:
    """How far two ways of computing a model's loss may differ, relative to it, here and now."""
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    return 1e-4 if exact else 2e-2


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """The precision in which the model computes."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        yield
        return
    with torch.autocast(device.type, dtype=kinds[precision]):
        yield
