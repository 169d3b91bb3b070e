"""The matrix: what a method can do, cell by cell, measured on small models.

A cell is "yes" where the capability was tried and did what it promises, "impossible: why" where
mathematics forbids it and the library refuses it with that reason, "-" where it has no meaning for
the method, and "no: what happened" otherwise.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from torch._dynamo.testing import CompileCounter

from ..config import OPTIONAL, PeftConfig
from ..hooks import UPDATES
from ..methods.lora_config import LoraConfig
from ..model import functional, updating
from . import laws
from .bench import close, parts_of, shake
from .entry import IDS, Entry

LAYERS = {
    "Linear": "linear linear_3d",
    "Conv1d": "conv1d",
    "Conv2d": "conv2d conv2d_groups conv2d_depthwise",
    "Conv3d": "conv3d",
    "tfConv1D": "conv1d_gpt2",
    "Embedding": "embedding embedding_padding embedding_max_norm embedding_scaled",
    "MHA": "attention attention_unequal",
    "tgt_params": "experts experts_transposed",
}


class MeaninglessError(Exception):
    """A capability asks for what the method does not have."""


def _reloads(entry: Entry, model: Any, tied: bool = False, **options: Any) -> None:
    """Saved and loaded again it gives the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = entry.loaded(folder, tied, **options)
    model.requires_grad_(False), loaded.requires_grad_(False)
    assert torch.equal(entry.run(loaded.eval()), entry.run(model)), "loaded, it answers otherwise"


def _sites(model: Any) -> set[str]:
    return {path for path, host in model.base_model.hosts().items() if host.parts_of("a0")}


def _several(entry: Entry) -> set[str]:
    """Where the method sits.

    Raises:
        MeaninglessError: at one place, so that there is nothing to choose from.
    """
    every = _sites(entry.small())
    if len(every) == 1:
        raise MeaninglessError("it sits at one place")
    return every


def merge(entry: Entry) -> None:
    """Merged, the model answers as before."""
    bench = entry.bench()
    model = bench.model()
    before = bench.run(model)
    model.merge_adapter()
    close(bench.run(model), before)
    close(bench.run(model.merge_and_unload()), before)


def unmerge(entry: Entry) -> None:
    """Unmerging restores every bit."""
    bench = entry.bench()
    model, base = bench.model(), bench.base().state_dict()
    model.merge_adapter()
    model.unmerge_adapter()
    back = model.unload().state_dict()
    assert all(torch.equal(back[name], base[name]) for name in base)


def multi(entry: Entry) -> None:
    """Two adapters of the method are active at once, in either order."""
    bench = entry.pair()
    bench.model().set_adapter(["a0", "a1"])
    laws.stacks_with_another(bench)


def mixbatch(entry: Entry) -> None:
    """Each row of a mixed batch is as alone, or an adapter's rows as they are without others."""
    laws.mixes_in_a_batch(entry.pair())


def disable(entry: Entry) -> None:
    """Disabled, the model is the base model."""
    laws.has_an_effect(entry.bench())


def hotswap(entry: Entry) -> None:
    """Another adapter's values take effect without another compilation."""
    model, other = _apart(entry)
    want = entry.run(other)
    with tempfile.TemporaryDirectory() as folder:  # what networks made is not to be made again
        model.save_pretrained(folder)
        model = entry.loaded(folder)
    updating.prepare_model_for_compiled_hotswap(model, target_rank=_rank(other))
    counter: Any = CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=counter, dynamic=False)
    entry.run(model)
    with torch.no_grad():
        compiled(IDS, **entry.call)
    before: int = counter.frame_count
    assert before > 0, "nothing was compiled"
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        model.hotswap_adapter(f"{folder}/a0", "a0")
    with torch.no_grad():
        close(compiled(IDS, **entry.call), want)
    assert counter.frame_count == before, "it was compiled again"


def _apart(entry: Entry) -> tuple[Any, Any]:
    """Two models with adapters of the method that have other values.

    Raises:
        MeaninglessError: the method has no values of its own.
    """
    model, other = entry.small(), entry.small()
    shake(other, seed=5)
    if torch.equal(entry.run(model), entry.run(other)):
        raise MeaninglessError("it has no values of its own")
    return model, other


def _changes_layers(entry: Entry) -> None:
    """Nothing where the method has updates of layers.

    Raises:
        MeaninglessError: it follows whole blocks, or has no values of its own.
    """
    if not entry.kinds:
        raise MeaninglessError("it follows whole blocks")
    _apart(entry)


def _rank(model: Any) -> int | None:
    ranks = [row.rank for row in model.adapters() if row.rank is not None]
    return max(ranks, default=None)


def weighted(entry: Entry) -> None:
    """A combination is that of the updates; of prompts it is all of them at once."""
    bench = entry.pair()
    model = bench.model()
    if model.peft_config["a0"].COMBINES != UPDATES:
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "new", "cat")
        both = []
        for names in (["a0", "a1"], ["new"]):
            with model.using(*names):
                both.append(bench.run(model))
        close(*both)
        return
    _changes_layers(entry)
    outputs = []
    for names in ([], ["a0"], ["a1"]):
        with model.using(*names):
            outputs.append(bench.run(model))
    base, first, second = outputs
    model.add_weighted_adapter(["a0", "a1"], [0.5, -1.0], "new", "linear")
    with model.using("new"):
        close(bench.run(model), base + 0.5 * (first - base) - (second - base))


def delete(entry: Entry) -> None:
    """Deleted, it is gone, and what is left is as before."""
    bench = entry.pair()
    model = bench.model(active=["a1"])
    alone = bench.run(model)
    model.delete_adapter("a0")
    assert torch.equal(bench.run(model), alone)
    assert not any(".a0." in name for name in model.state_dict())


def layer(kinds: str) -> Callable[[Entry], None]:
    """It works at a type of layer: has an effect, and answers as its folded weight does."""

    def tried(entry: Entry) -> None:
        wanted = [k for k in kinds.split() if k in entry.kinds]
        for kind in wanted or kinds.split():
            laws.has_an_effect(entry.bench(kind))
            laws.forward_is_the_folded_weight(entry.bench(kind))

    return tried


def tied(entry: Entry) -> None:
    """At a tied embedding the other end keeps its weight, merged and saved as well."""
    model = entry.small(entry.at(entry.ends[:1]), tied=True)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(entry.run(model), entry.base(True)(IDS))
    adapted = entry.run(model)
    _reloads(entry, model, tied=True)
    if entry.bench("embedding").forbids("merge"):
        return
    model.merge_adapter()
    close(entry.run(model), adapted)
    model.unmerge_adapter()
    assert torch.equal(entry.run(model), adapted)
    close(model.merge_and_unload()(IDS), adapted)


def overrides(entry: Entry) -> None:
    """A field has another value at one place, which makes a difference."""
    plain = entry.small()
    where = max(_sites(plain))
    for name, value in other_values(entry.at()):
        config = entry.at(overrides={where: {name: value}})
        try:
            model = entry.small(config)
        except ValueError as error:  # not with the other fields as they are
            if "has no meaning" in str(error):
                raise MeaninglessError from error
            continue
        got = {path: _plain(getattr(config.at(path), name)) for path in _sites(model)}
        assert {path for path in got if got[path] == value} == {where}
        if torch.equal(entry.run(model), entry.run(plain)):  # it matters in training alone
            continue
        _reloads(entry, model)
        return
    raise AssertionError("no field can be overridden")


def other_values(config: PeftConfig) -> list[tuple[str, Any]]:
    """Fields of the method's own with other values than they have.

    Raises:
        MeaninglessError: it has no fields that could differ from layer to layer.
    """
    found = _others(config)
    if not found:
        raise MeaninglessError(f"{type(config).__name__} has no field of its own")
    return found


def _others(config: Any) -> list[tuple[str, Any]]:
    own = {f.name for f in fields(config)} - OPTIONAL - {f.name for f in fields(PeftConfig)}
    found: list[tuple[str, Any]] = []
    for name in sorted(own):
        value = getattr(config, name)
        if isinstance(value, bool):
            found += [(name, not value)] * name.startswith("init")
        elif isinstance(value, int) and value and "seed" not in name and "key" not in name:
            found += [(name, value + 1), (name, value + 2), (name, value - 1 or value + 3)]
        elif isinstance(value, float) and value:
            found.insert(0, (name, value / 2))
        elif is_dataclass(value):
            found += [(name, _plain(value) | {inner: other}) for inner, other in _others(value)]
    return found


def _plain(value: Any) -> Any:
    """A config within a config as it is in a file."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def modules_to_save(entry: Entry) -> None:
    """A module trains as a whole beside it, and is saved with it."""
    head = entry.ends[1]
    model = entry.small(entry.at(modules_to_save=[head]))
    with model.disable_adapter():
        assert not torch.equal(entry.run(model), entry.run(entry.small()))
    assert any(head in n for n, p in model.named_parameters() if p.requires_grad)
    _reloads(entry, model)


def token_indices(entry: Entry) -> None:
    """Rows of the embedding train beside it."""
    embed = entry.ends[0]
    model = entry.small(entry.at(trainable_token_indices={embed: [1, 3]}))
    assert any(site.endswith(embed) for site in _sites(model))
    _reloads(entry, model)


def layers_to_transform(entry: Entry) -> None:
    """Only the chosen blocks are adapted."""
    every = _several(entry)
    model = entry.small(entry.at(layers_to_transform=[1], layers_pattern=["layers"]))
    assert _sites(model) == {site for site in every if "layers.1" in site} != every
    _reloads(entry, model)


def exclude(entry: Entry) -> None:
    """A layer is left out by name."""
    every = _several(entry)
    model = entry.small(entry.at(exclude_modules=[max(every)]))
    assert _sites(model) == every - {max(every)} != set()
    _reloads(entry, model)


def to_lora(entry: Entry) -> None:
    """As a LoRA it does the same, and says what a smaller rank leaves out."""
    _changes_layers(entry)
    bench = entry.bench()
    model = bench.model()
    done = model.to_lora("a0", "lora")
    before = bench.run(model)
    with model.using("lora"):
        close(bench.run(model), before)
    assert done.worst < 1e-4
    assert 0 <= model.to_lora("a0", "one", rank=1).worst <= 1


def mixed(entry: Entry) -> None:
    """It works together with a LoRA in one model, saved and loaded."""
    bench = entry.beside(LoraConfig(r=2))
    laws.stacks_with_another(bench)
    laws.mixes_in_a_batch(bench)


def native(entry: Entry) -> None:
    """It is injected into a model without a wrapper; its tensors are read and given back."""
    model, new = entry.native(), entry.native(inference_mode=True)
    shake(model)
    tensors = functional.get_peft_model_state_dict(model, adapter_name="a0")
    functional.set_peft_model_state_dict(new, tensors, "a0")
    model.requires_grad_(False), new.requires_grad_(False)
    assert torch.equal(entry.run(model), entry.run(new))
    with functional.using(model, rows=["__base__"] * 4), torch.no_grad():
        close(model(IDS), entry.base()(IDS), 1e-6)


def low_memory(entry: Entry) -> None:
    """It is loaded without being filled with random numbers first."""
    _reloads(entry, entry.small(), low_cpu_mem_usage=True)


CAPABILITIES: dict[str, Callable[[Entry], None]] = {
    "merge": merge,
    "unmerge": unmerge,
    "multi": multi,
    "mixbatch": mixbatch,
    "disable": disable,
    "hotswap": hotswap,
    "weighted": weighted,
    "delete": delete,
    **{name: layer(kinds) for name, kinds in LAYERS.items()},
    "tied": tied,
    "overrides": overrides,
    "mod_to_save": modules_to_save,
    "tok_idx": token_indices,
    "layers_tt": layers_to_transform,
    "exclude": exclude,
    "toLoRA": to_lora,
    "Mixed": mixed,
    "native": native,
    "low_mem": low_memory,
}


def measure(entry: Entry, capability: str) -> str:
    """The content of one cell."""
    reasons = _reasons(entry)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CAPABILITIES[capability](deepcopy(entry))
    except MeaninglessError:
        return "-"
    except Exception as error:
        text = str(error).strip()
        if reason := next((why for said, why in reasons.items() if said in text), None):
            return f"impossible: {reason}"
        kinds = LAYERS.get("Embedding" if capability == "tied" else capability, "").split()
        refused = isinstance(error, (ValueError, TypeError))
        if kinds and refused and not set(kinds) & set(entry.kinds):
            return "-"
        return f"no: {type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return "yes"


def _reasons(entry: Entry) -> dict[str, str]:
    """What an error says -> why mathematics forbids it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = parts_of(entry.bench().model(0))
    reasons = {reason: reason for p in parts for reason in p.FORBIDS.values()}
    if any(p.instead() for p in parts):
        reasons["puts its values in place of"] = "each is the weight itself: one replaces another"
    return reasons
