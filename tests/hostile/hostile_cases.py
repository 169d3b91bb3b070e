"""Folders that somebody broke or made to do harm: each is a good one with one thing changed."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Change = Callable[[Path], Any]
CASES: dict[str, Change] = {}


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/graftwork_was_here",)


def raw(data: bytes) -> Change:
    """Another config."""
    return lambda folder: (folder / CONFIG).write_bytes(data)


def said(**values: Any) -> Change:
    """Other fields of the config."""

    def change(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**data, **values}))

    return change


def prompt(**values: Any) -> Change:
    """A prompt's config."""
    return raw(
        json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", **values}).encode()
    )


def split(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header of the weights, and what follows it."""
    data = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def headed(text: bytes, body: bytes, length: int | None = None) -> bytes:
    """A file of a header and what follows it."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Another header before the same numbers."""

    def write(folder: Path) -> None:
        head, body = split(folder)
        head.pop("__metadata__", None)
        change(head)
        (folder / WEIGHTS).write_bytes(headed(json.dumps(head).encode(), body))

    return write


def first(**values: Any) -> Change:
    """Another first tensor of the header."""
    return header(lambda head: next(iter(head.values())).update(values))


def weights(data: bytes) -> Change:
    """Another file of weights."""
    return lambda folder: (folder / WEIGHTS).write_bytes(data)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Other tensors."""

    def write(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return write


def pickled(data: bytes) -> Change:
    """A pickle instead of the weights."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / PICKLE).write_bytes(data)

    return write


def saved(value: Any, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def bomb() -> bytes:
    """An archive of a tensor that is compressed a thousandfold."""
    plain, packed = io.BytesIO(saved({"a": torch.zeros(1 << 20)})), io.BytesIO()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for one in old.infolist():
            new.writestr(one.filename, old.read(one.filename))
    return packed.getvalue()


def link(name: str, target: str) -> Change:
    """A link in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def moved(name: str) -> Change:
    """A good file outside, with a link to it."""

    def change(folder: Path) -> None:
        outside = folder.parent.parent / f"outside_{folder.name}"
        os.replace(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def instead(name: str, make: Callable[[Path], Any]) -> Change:
    """A pipe or a folder in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


CASES |= {
    # the text of the config
    "empty": raw(b""),
    "only space": raw(b" \n"),
    "not utf-8": raw(b'{"peft_type": "\xff\xfe"}'),
    "utf-16": raw('{"peft_type": "LORA"}'.encode("utf-16")),
    "half of it": lambda f: (f / CONFIG).write_bytes((f / CONFIG).read_bytes()[:99]),
    "a list": raw(b"[]"),
    "a number": raw(b"1"),
    "null": raw(b"null"),
    "deep list": raw(b"[" * 100_000),
    "deep object": raw(b'{"peft_type":' * 100_000),
    "deep and whole": raw(b'{"peft_type":"LORA","x":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "large": raw(b'{"peft_type": "LORA"' + b" " * (9 << 20) + b"}"),
    "many values": raw(b'{"peft_type": "LORA", "x": [' + b"[]," * 600_000 + b"[]]}"),
    "twice": raw(b'{"peft_type": "LORA", "r": 2, "r": 3}'),
    "a long number": raw(b'{"peft_type": "LORA", "r": ' + b"9" * 100_000 + b"}"),
    "a number beyond 64 bits": raw(b'{"peft_type": "LORA", "r": 99999999999999999999}'),
    "no method": raw(b'{"r": 2}'),
    "unknown method": said(peft_type="PEFTY"),
    "method as a number": said(peft_type=7),
    "method as a list": said(peft_type=["LORA"]),
    "method as an object": said(peft_type={"LORA": 1}),
    "method of megabytes": said(peft_type="L" * 2_000_000),
    "method with code": said(peft_type="__import__('os').system('true')"),
    # its fields
    "rank below one": said(r=0),
    "rank as a text": said(r="8"),
    "rank not a number": said(r=float("nan")),
    "rank of a billion": said(r=10**9),
    "rank of 2^62": said(r=2**62),
    "a billion at one place": said(rank_pattern={"up": 10**9}),
    "endless scale": said(lora_alpha=float("inf")),
    "unknown field": said(eval="__import__('os').system('true')"),
    "unknown field of megabytes": said(**{"x" * 2_000_000: "y" * 2_000_000}),
    "value of megabytes": said(init_lora_weights="x" * 2_000_000),
    "unknown task": said(task_type="EXEC"),
    "targets as an object": said(target_modules={"up": {"down": 1}}),
    "targets of numbers": said(target_modules=[1, 2]),
    "no targets": said(target_modules=[]),
    "targets elsewhere": said(target_modules=["q_proj"]),
    "a text where a list is": said(modules_to_save="x" * 1_000_000),
    "a broken pattern": said(target_modules="(up"),
    "a pattern that never ends": said(target_modules="((([a-z0-9.]+)+)+)+!"),
    "a pattern of many repeats": said(target_modules=".*" * 30 + "!"),
    "a pattern of many options": said(target_modules="[a-z.0-9]?" * 40 + "[a-z.0-9]" * 40),
    "a pattern that looks back": said(target_modules=r"((a+)+)+\2!"),
    "a pattern of megabytes": said(target_modules="a|" * 1_000_000),
    "a pattern that is deep": said(target_modules="(" * 5000 + ")" * 5000),
    "a pattern of ranks without end": said(rank_pattern={"(([a-z0-9.]+)+)+!": 2}),
    "a pattern of scales without end": said(alpha_pattern={"(.*)*.*.*.*.*.*!": 2}),
    "a pattern in front of blocks": said(layers_to_transform=[0], layers_pattern=["(l+)+(a+)+!"]),
    "overrides as a list": said(overrides=[1]),
    "overrides of what is none": said(overrides={"up": 3}),
    "overrides of methods": said(overrides={"up": {"peft_type": "X"}}),
    "blocks as texts": said(layers_to_transform=["0"]),
    "blocks that are not there": said(layers_to_transform=[10**12]),
    "blocks without end": said(layer_replication=[[0, 10**9]]),
    "blocks again and again": said(layer_replication=[[0, 2]] * 20_000),
    "tokens as texts": said(trainable_token_indices=["a"]),
    "tokens that are not there": said(trainable_token_indices=[10**12]),
    "a part as a list": said(corda_config=[1]),
    "a part of what is none": said(corda_config={"run": "code"}),
    "a module to import": said(megatron_core="evil_module", megatron_config={"x": 1}),
    "experts elsewhere": raw(
        json.dumps({"peft_type": "XLORA", "adapters": {"0": "/etc", "../x": "../../y"}}).encode()
    ),
    "experts as numbers": raw(b'{"peft_type": "XLORA", "adapters": {"0": 1}}'),
    "a trillion virtual tokens": prompt(num_virtual_tokens=10**12, token_dim=8),
    "half a virtual token": prompt(num_virtual_tokens=0.5),
    "code with a tokenizer": prompt(
        num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="x",
        tokenizer_name_or_path="/etc/passwd", tokenizer_kwargs={"trust_remote_code": True},
    ),
    "a prompt from elsewhere": raw(
        json.dumps({"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2,
                    "prompt_tuning_init": "EXACT_SOURCE_TASK", "inference_mode": False,
                    "prompt_tuning_init_state_dict_path": "/etc/passwd"}).encode()
    ),
    "vectors without end": raw(
        b'{"peft_type":"VBLORA","vector_length":1000000000000,"target_modules":["up"]}'
    ),
    "directions without end": raw(
        b'{"peft_type":"VERA","r":1000000000,"target_modules":["up"],"save_projection":false}'
    ),
    "a classifier without end": raw(
        b'{"peft_type":"XLORA","xlora_depth":1000000000,"adapters":{"0":"../none"}}'
    ),
    # the header of the weights
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "empty weights": weights(b""),
    "seven bytes": weights(b"\0" * 7),
    "a header longer than the file": weights((10**6).to_bytes(8, "little") + b"{}"),
    "a header of 2^63 bytes": weights(b"\xff" * 8 + b"{}"),
    "a header of 100 MB": weights((100 << 20).to_bytes(8, "little") + b" " * (1 << 20)),
    "no header": weights(headed(b"", b"", 0)),
    "a header that is no JSON": weights(headed(b"{nothing", b"")),
    "a header that is a list": weights(headed(b"[]", b"")),
    "a deep header": weights(headed(b'{"a":' + b"[" * 100_000, b"")),
    "a pointer of Git LFS": weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "cut": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-3]),
    "longer than it says": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"),
    "no offsets": header(lambda h: next(iter(h.values())).pop("data_offsets")),
    "negative offsets": first(data_offsets=[-8, 56]),
    "offsets the wrong way round": first(data_offsets=[64, 0]),
    "offsets beyond the file": first(data_offsets=[10**12, 10**12 + 64]),
    "three offsets": first(data_offsets=[0, 1, 2]),
    "offsets of 2^64": first(data_offsets=[0, 2**64]),
    "tensors in one place": header(
        lambda h: [one.update(data_offsets=next(iter(h.values()))["data_offsets"])
                   for one in h.values()]
    ),
    "an unknown type": first(dtype="F1"),
    "a type as a number": first(dtype=32),
    "a shape below zero": first(shape=[-1, -64]),
    "a shape beyond 64 bits": first(shape=[2**40, 2**40]),
    "a shape of many sides": first(shape=[1] * 100_000),
    "a shape of no numbers": first(shape=["a"]),
    "another shape": first(shape=[64, 1]),
    "a tensor that is none": header(lambda h: h.update(x=3)),
    "notes that are no texts": header(lambda h: h.update(__metadata__={"a": {"b": 1}})),
    "a name twice": lambda f: (f / WEIGHTS).write_bytes(
        headed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
               b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x")
    ),
    "a tensor too many": tensors(lambda t: t.update(extra=torch.ones(1))),
    "a name of megabytes": tensors(lambda t: t.update({"x" * 1_000_000: torch.ones(1)})),
    "a tensor missing": tensors(lambda t: t.pop(next(iter(t)))),
    "other names": tensors(lambda t: [t.update({f"{k}/../x": t.pop(k)}) for k in list(t)]),
    "no tensors": tensors(lambda t: t.clear()),
    # pickles, with and without leave
    "a pickle": pickled(pickle.dumps({"a": 1})),
    "a pickle with code": pickled(pickle.dumps({"a": Evil()}, protocol=2)),
    "an archive with code": pickled(saved({"a": Evil()})),
    "a pickle that is none": pickled(b"nothing"),
    "an empty pickle": pickled(b""),
    "a list in a pickle": pickled(saved([torch.ones(1)])),
    "no tensors in a pickle": pickled(saved({"a": "b"})),
    "names of no text": pickled(saved({1: torch.ones(1)})),
    "a packed archive": pickled(bomb()),
    "half an archive": pickled(saved({"a": torch.ones(9)})[:-40]),
    # files that are none
    "a folder as config": instead(CONFIG, Path.mkdir),
    "a folder as weights": instead(WEIGHTS, Path.mkdir),
    "a pipe as config": instead(CONFIG, os.mkfifo),
    "a pipe as weights": instead(WEIGHTS, os.mkfifo),
    "a device as config": link(CONFIG, "/dev/zero"),
    "a device as weights": link(WEIGHTS, "/dev/urandom"),
    "a link to itself": link(CONFIG, CONFIG),
    "a link to nothing": link(WEIGHTS, "nothing"),
    "a link outside as config": moved(CONFIG),
    "a link outside as weights": moved(WEIGHTS),
    "a link to passwords": link(CONFIG, "/etc/passwd"),
}  # fmt: skip
