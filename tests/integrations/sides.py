"""One program, run under ``graftwork.as_peft()`` and with the real peft: what both report must be
the same. Imported before any other library.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
SIDE, FOLDER = sys.argv[1], Path(sys.argv[2])  # "graftwork" or "peft"; an own folder
if SIDE == "graftwork":
    import graftwork

    graftwork.as_peft()

import torch  # noqa: E402
import transformers.integrations.peft as native  # noqa: E402

if SIDE == "peft":  # transformers asks for a newer one than the oracle is
    native.MIN_PEFT_VERSION = "0"
torch.set_num_threads(1)
warnings.simplefilter("ignore")
FOUND: dict[str, Any] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run a function now and report what it returns under its name, or what it raised."""
    torch.manual_seed(0)
    try:
        FOUND[function.__name__] = function()
    except Exception:
        FOUND[function.__name__] = {"error": traceback.format_exc()[-2500:]}
    return function


def page(heading: str, names: dict[str, str]) -> None:
    """Run the code under a heading of the page on other libraries, with paths for its ``names``."""
    text = (Path(__file__).parents[2] / "docs" / "libraries.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"^```py\n(.*?)^```", section, re.M | re.S))
    for name, path in names.items():
        assert name in code, name
        code = code.replace(name, path)

    def the_page() -> str:
        os.chdir(FOLDER)
        exec(compile(code, heading, "exec"), {})
        return "it runs"

    if SIDE == "graftwork":
        check(the_page)


def report() -> None:
    """Print what all checks returned, as the last line."""
    print(json.dumps(FOUND))


def numbers(tensor: Any, count: int = 12) -> list[float]:
    """A few numbers that tell a tensor from others: its norm, its sum, its first ones."""
    flat = tensor.detach().float().flatten()
    return [float(flat.norm()), float(flat.sum()), *flat[:count].tolist()]


def drawn(shape: Any, name: str, size: float = 1.0) -> torch.Tensor:
    """Random numbers that are the same for a name wherever they are asked for."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * size


def fill(model: Any, name: str = "default", salt: str = "", size: float = 0.1) -> Any:
    """Give an adapter values that only the names in its file decide."""
    import peft

    tensors = peft.get_peft_model_state_dict(model, adapter_name=name)
    for key, tensor in tensors.items():
        plain = key.removeprefix("base_model.model.")
        tensors[key] = drawn(tensor.shape, plain + salt, size).to(tensor.dtype)
    peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
    return model


def tensors_of(path: Path) -> dict[str, list[float]]:
    """The tensors of a safetensors file: name -> some numbers."""
    from safetensors.torch import load_file

    return {key: numbers(value, 3) for key, value in sorted(load_file(path).items())}


def raised(function: Callable[[], Any]) -> str:
    """Which of Python's own errors a call raises; "" for nothing."""
    try:
        function()
    except Exception as error:
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return ""
