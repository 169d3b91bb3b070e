"""The shapes that an adapter's folder has: every method's, and what several adapters, pickles and
shards make of it. Each is two adapters to save in one place, and what a reader finds there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftwork import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    XLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from graftwork.files.folder import BESIDE, Contents, read_beside
from graftwork.files.hub import Source
from graftwork.testing.bench import shake
from graftwork.testing.entry import IDS, Entry, Small
from specs import ROWS
from specs.mixtures import experts

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Save = Callable[[Path], None]


@dataclass
class Shape:
    """One shape.

    Args:
        model: builds the model with the first (0) or the second (1) adapter.
        facts: what a reader finds in the folder.
        old: makes the folder that is saved over, with a function that saves the first adapter.
        once: whether that form is gone after a save.
        kept: names that the old form leaves in the folder.
    """

    model: Callable[[int], Any]
    facts: Callable[[Path], Any]
    old: Callable[[Path, Save], None] = lambda folder, save: save(folder)
    once: bool = False
    kept: frozenset[str] = frozenset()

    def saver(self, which: int) -> Save:
        model = self.model(which)
        return lambda folder: model.save_pretrained(folder)


def bits(tensors: Any) -> Any:
    """Tensors as what can be compared."""
    plain = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    return [
        (k, str(t.dtype), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for k, t in sorted(plain.items())
    ]


def told(model: PeftModel) -> Any:
    """Everything about the adapters of a model."""
    every = []
    for name, config in sorted(model.peft_config.items()):
        plain = {k: str(v) for k, v in json.loads(config.to_json()).items()}
        every.append(
            (name, sorted(plain.items()), bits(get_peft_model_state_dict(model, None, name)))
        )
    return every


def beside(folder: Path) -> Any:
    """What lies beside an adapter."""
    source = Source(folder)
    note = Contents(source).note
    card = source.find("README.md")
    return [
        *(bits(read_beside(source, key, note)) for key in BESIDE),
        card and card.read_text(encoding="utf-8"),
    ]


def method(entry: Entry) -> Shape:
    """A method's folder, within that of its model."""

    def build(which: int) -> Any:
        config = entry.at()
        if which and entry.other is not None and entry.kinds == entry.bench().kind:
            config = entry.other()
        model = entry.small(config)
        shake(model, seed=2 + which)
        if not any(p.requires_grad for p in model.parameters()):
            model.peft_config["a0"].revision = f"{which}"  # it has no values of its own
        return model

    def facts(folder: Path) -> Any:
        model = entry.loaded(str(folder))
        shown = {"a0": model.peft_config["a0"]}
        own = get_peft_model_state_dict(model, None, "a0")
        config = [(n, sorted(json.loads(c.to_json()).items())) for n, c in shown.items()]
        return str(config), bits(own), beside(folder / "a0"), bits({"y": entry.run(model)})

    return Shape(build, facts)


def base() -> Any:
    torch.manual_seed(0)
    return Small().eval()


def one(*configs: Any, setup: Any = None) -> Callable[[int], Any]:
    """Builds a model with the adapters default, b, c, ... of the first or the second config."""

    def build(which: int) -> Any:
        model = base()
        for name, pair in zip(("default", "b", "c"), configs, strict=False):
            config = copy.deepcopy(pair[which])
            if isinstance(config, XLoraConfig):
                experts(base(), config, IDS)
            if name == "default":
                model = get_peft_model(model, config)
            else:
                model.add_adapter(name, config)
        model.set_requires_grad(list(model.peft_config))
        shake(model, seed=4 + which)
        return model.eval()

    return build


def whole(folder: Path) -> Any:
    """The adapter of a folder and those in folders within."""
    found = []
    for inner in ("", "b", "c"):
        if inner and Source(folder).find(f"{inner}/{CONFIG}") is None:
            continue
        model = PeftModel.from_pretrained(
            base(), folder, subfolder=inner or None, allow_pickle=True
        )
        alone = PeftModel.from_pretrained(base(), folder / inner, allow_pickle=True)
        assert told(model) == told(alone)
        with torch.no_grad():
            found.append((told(model), bits({"y": model(IDS)}), beside(folder / inner)))
    return found


def trained(which: int) -> Any:
    """An AdaLoRA in the midst of its schedule."""
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=9, target_modules=["up"]
    )
    model = get_peft_model(base(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3 + which):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def resumed(folder: Path) -> Any:
    """An adapter whose training goes on."""
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    schedule = model.base_model.switch.schedules["default"]
    return told(model), schedule.step, beside(folder)


def pickled(folder: Path, save: Save) -> None:
    """The old adapter as a pickle, as others have written it."""
    save(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def sharded(folder: Path, save: Save) -> None:
    """The old adapter in two files, as transformers writes a large one."""
    save(folder)
    tensors = list(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    halves = dict(tensors[::2]), dict(tensors[1::2])
    weights = {}
    for i, own in enumerate(halves):
        name = f"adapter_model-{i + 1:05}-of-00002.safetensors"
        save_file(own, folder / name, {"format": "pt"})
        weights |= dict.fromkeys(own, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def only_config(which: int) -> Any:
    return LoraConfig(r=2 + which, target_modules=["up", "down"])


def loras(**options: Any) -> tuple[Any, Any]:
    """Two LoRAs that differ in more than their values."""
    return tuple(LoraConfig(r=r, target_modules=["up"], **options) for r in (2, 3))  # type: ignore


def mixture() -> tuple[Any, Any]:
    return tuple(  # type: ignore
        XLoraConfig(hidden_size=8, target_modules=["up"], use_trainable_adapters=True, xlora_size=n)
        for n in (4, 6)
    )


IA3 = tuple(IA3Config(target_modules=[x], feedforward_modules=[]) for x in ("up", "down"))
SHARDS = {f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
SHAPES: dict[str, Shape] = {
    **{name: method(entry) for name, entry in ROWS.items()},
    "modules_to_save": Shape(one(loras(modules_to_save=["head"])), whole),
    "bias": Shape(one(loras(bias="all")), whole),
    "tokens": Shape(one(loras(trainable_token_indices=[3, 5])), whole),
    "several": Shape(one(loras(), IA3, loras(use_dora=True)), whole),
    "X-LoRA": Shape(one(mixture()), whole),
    "X-LoRA beside": Shape(one(loras(), mixture()), whole),
    "in training": Shape(trained, resumed),
    "pickle": Shape(one(loras()), whole, pickled, True, frozenset({"adapter_model.bin"})),
    "shards": Shape(
        one(loras()), whole, sharded, True, frozenset({"model.safetensors.index.json", *SHARDS})
    ),
    "config": Shape(only_config, lambda folder: PeftConfig.from_pretrained(folder).to_json()),
}
