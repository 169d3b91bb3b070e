"""What reads files that others wrote, as functions of bytes: each returns, or raises an error of
this library, whatever the bytes are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from graftwork.config import PeftConfig
from graftwork.errors import GraftworkError
from graftwork.files import align, bounded, codec, contents, folder, mapped, pickled, plain
from graftwork.patterns import patterns, regex
from graftwork.table import METHODS, method
from graftwork.train import bundle, recipe

PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.language_model.layers.10.mlp.experts.gate_up_proj",
    "transformer.h.3.attn.c_attn",
    "lm_head",
)
CONFIGS: list[tuple[str, list[str]]] = [
    (name, sorted(f.name for f in fields(method(name).config))) for name in METHODS
]
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 8, 10**9, 2**62, 10**30, 0.5, -0.5, 1e300, float("nan"),
    float("inf"), "", "x", "all-linear", "(a+)+$", "(", "../../x", "\0", "none", "all", "lora_only",
    [], [1], [-1], ["x"], [[0, 2]], [[[]]], {}, {"x": 1}, {"(a+)+$": 2}, {"x": {"r": 1}},
]  # fmt: skip


def config(data: bytes) -> None:
    """``adapter_config.json``; where the first byte is low, a config of any method with a few
    fields that the bytes choose.
    """
    if data[:1] < b"\x20" and len(data) > 3:
        name, known = CONFIGS[data[1] % len(CONFIGS)]
        said: dict[str, Any] = {"peft_type": name}
        for i in range(2, len(data) - 1, 2):
            said[known[data[i] % len(known)]] = NASTY[data[i + 1] % len(NASTY)]
        data = json.dumps(said).encode()
    made: PeftConfig = folder.config_in(data, "the config")
    made.to_json()


def header(data: bytes) -> None:
    """The header of a safetensors file; the first four bytes are the file's size."""
    size = int.from_bytes(data[:4], "little")
    held = mapped.placed(data[4:], size if size < 1 << 31 else len(data) + 4)
    assert all(held.start <= one.begin <= one.end <= held.size for one in held.entries.values())
    folder._note(held.metadata)


def names(data: bytes) -> None:
    """Names of tensors, one a line: read as names of adapters, and compared with a model's."""
    lines = [line for line in data.decode("utf-8", "replace").split("\n") if line][:64]
    want = {f"{path}.lora_{k}.weight": (2, 3) for path in PATHS for k in "AB"}
    keys = {name: "lora_A.weight" for name in want}
    plainly = {codec.renamed(line, None, want): (2, 3) for line in lines}
    here = {name: shape for name, shape in want.items() if name not in plainly}
    there = {name: shape for name, shape in plainly.items() if name not in want}
    align.moved(there, here, {name: keys[name] for name in here})
    made = method("LORA").config(target_modules=["q_proj"])
    contents.grouped(made, [contents.Held(line, "fp32", (2, 3)) for line in lines])
    str(codec.LoadReport(missing=list(here), unexpected=list(there)))


def index(data: bytes) -> None:
    """``model.safetensors.index.json``."""
    found = bounded.mapped_weights(data, "the index")
    assert all("/" not in name and name not in ("", ".", "..") for name in found.values())


def card(data: bytes) -> None:
    """``README.md``."""
    plain.checked_card(data, "README.md")


def settings(data: bytes) -> None:
    """The YAML file of ``graft train``."""
    recipe.build({}, recipe.settings(data, "recipe.yaml"))


def note(data: bytes) -> None:
    """``graftwork.json``."""
    bundle.noted(data, "graftwork.json")


def pattern(data: bytes) -> None:
    """A regular expression of a config, as it is compared with the paths of a model."""
    text = data.decode("utf-8", "replace")
    known = patterns(text, "q_proj")
    for path in PATHS:
        list(known.meaning(path))
        regex(text).fullmatch(path)


def pickle(data: bytes) -> None:
    """``adapter_model.bin``, for which leave was given."""
    pickled.loaded(io.BytesIO(data), len(data), "adapter_model.bin")


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (config, header, names, index, card, settings, note, pattern, pickle)
}


def survive(name: str, data: bytes) -> bool:
    """Whether a loader takes these bytes; any other error than this library's is a crash."""
    try:
        TARGETS[name](data)
    except GraftworkError as error:
        assert len(str(error)) < 20_000, f"a message of {len(str(error))} characters"
        return False
    return True
