"""The laws that hold for every method at every kind of layer; each takes a bench and asserts."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.host import LayerHost
from ..errors import MergeError, StateError
from ..model.peft_model import PeftModel
from .bench import Bench, close, parts_of, shake


def starts_as_identity(bench: Bench) -> None:
    """A new adapter changes nothing."""
    model = bench.model(jiggle=0)
    with model.disable_adapter():
        base = bench.run(model)
    close(bench.run(model), base, 1e-6)


def has_an_effect(bench: Bench) -> None:
    """A trained adapter changes something, and disabling it gives the base model."""
    model = bench.model()
    adapted = bench.run(model)
    with model.disable_adapter():
        base = bench.run(model)
    close(base, bench.base()(bench.x()), 1e-6)
    assert not torch.allclose(base, adapted), "the adapter has no effect"


def forward_is_the_folded_weight(bench: Bench) -> None:
    """Merged and unmerged answer alike; unmerging restores every bit."""
    model = bench.model()
    before = _base_tensors(model)
    adapted = bench.run(model)
    if reason := _unmergeable(bench):
        _refuses(model.merge_adapter, reason)
    else:
        model.merge_adapter()
        close(bench.run(model), adapted)
        with model.disable_adapter():
            close(bench.run(model), bench.base()(bench.x()))
        model.unmerge_adapter()
    assert torch.equal(bench.run(model), adapted)
    after = _base_tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items()), "bits changed"


def _unmergeable(bench: Bench) -> str:
    if reason := bench.forbids("merge"):
        return reason
    if getattr(bench.base().l, "bias", None) is not None:
        return ""
    hosts = [h for h in bench.model(0).base_model.hosts().values() if isinstance(h, LayerHost)]
    folded = [p.fold(h.site.weight, None) for h in hosts for _, p in h.parts_of("a0")]
    return "layer has none" if any(b is not None for _, b in folded) else ""


def _refuses(call: Callable[[], Any], reason: str, kind: type[Exception] = MergeError) -> None:
    try:
        call()
    except kind as error:
        assert reason in str(error), f"the error does not say why: {error}"
    else:
        raise AssertionError("it should be refused")


def gradients_reach_the_adapter_alone(bench: Bench) -> None:
    """Every trainable tensor that is read gets a finite gradient, and nothing else gets any."""
    model = bench.model()
    last = parts_of(model)[-1]
    idle = {id(p) for name in last.relays for p in getattr(last, name).parameters()}
    model.train()
    torch.manual_seed(0)
    bench.run(model).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.requires_grad and id(p) not in idle) == (p.grad is not None), name
        assert not p.requires_grad or ".adapters." in name, name
        assert p.grad is None or bool(p.grad.isfinite().all()), name
    assert any(p.grad is not None for p in model.parameters()), "nothing is trained"


def unloading_gives_back_the_model(bench: Bench) -> None:
    """The user's own objects, tensors, bits and hooks."""
    model = bench.base()
    getattr(model, "l", model).register_forward_hook(_hook)
    parts = {name: id(module) for name, module in model.named_modules()}
    tensors = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    wrapped = bench.setup().attach(model, bench.config(), "a0", bench.x())
    shake(wrapped)
    bench.run(wrapped)
    back = wrapped.unload()
    assert back is model
    assert {name: id(module) for name, module in back.named_modules()} == parts
    now = back.state_dict(keep_vars=True)
    assert now.keys() == tensors.keys()
    assert all(now[n] is t and torch.equal(t, kept) for n, (t, kept) in tensors.items())
    assert [h for m in back.modules() for h in m._forward_hooks.values()] == [_hook]
    assert not any(m._forward_pre_hooks for m in back.modules())
    assert all(p.requires_grad for p in back.parameters())


def _hook(*_: Any) -> None:
    return None


def saving_keeps_every_bit(bench: Bench) -> None:
    """What is saved and loaded again answers with the same bits."""
    model = bench.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = bench.setup().load(bench.base(), f"{folder}/a0", "a0", bench.x())
    model.requires_grad_(False), loaded.requires_grad_(False)  # torch has kernels for either case
    with torch.no_grad():
        assert torch.equal(bench.run(loaded), bench.run(model))
    # of what a network makes a file holds what it made, and loaded there is no network
    made = any(shared.resumes for shared in model.base_model.switch.shared.values())
    mine, theirs = (_base_tensors(m) if made else m.state_dict() for m in (model, loaded))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def copies_are_the_same_model(bench: Bench) -> None:
    """deepcopy and pickle: alike, and independent."""
    model = bench.model()
    y = bench.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(bench.run(twin), y)
        with twin.disable_adapter():
            assert not torch.allclose(bench.run(twin), y)
        shake(twin, seed=2)
        assert not torch.equal(bench.run(twin), y) and torch.equal(bench.run(model), y)


def compiles_without_graph_breaks(bench: Bench) -> None:
    """One graph, and the same answers."""
    model = bench.model()
    y = bench.run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(bench.run(compiled), y)
    with model.disable_adapter():
        close(bench.run(compiled), bench.run(model))
    torch._dynamo.reset()  # what was compiled is kept otherwise


def works_in(dtype: torch.dtype, bench: Bench) -> None:
    """A base model in another dtype: the adapter stays in fp32 or better, outputs do not.

    Copies of modules keep their own dtype.
    """
    model = bench.model(dtype=dtype)
    copies = any(part.instead() is not None for part in parts_of(model, "a0"))
    wide = dtype if copies else torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wide}
    adapted = bench.run(model, dtype=dtype)
    assert adapted.dtype == dtype
    if _unmergeable(bench):
        return
    model.merge_adapter()
    layer = model.base_model.model.l.base_layer
    assert {p.dtype for p in layer.parameters()} == {dtype}
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-10}[dtype]
    merged = bench.run(model, dtype=dtype)
    torch.testing.assert_close(merged, adapted, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    assert torch.equal(bench.run(model, dtype=dtype), adapted)


def dropout_acts_in_training_alone(bench: Bench, name: str) -> None:
    """With the field ``name`` at a half, forwards in training differ, and others do not."""
    model = bench.model()
    still = bench.run(model)
    config: Any = bench.configs[0]
    bench.configs = [replace(config, **{name: 0.5})]
    drops = bench.model()
    assert torch.equal(bench.run(drops), still)
    if not bench.forbids("merge"):
        drops.train().merge_adapter()
        close(bench.run(drops.eval()), still)
        drops.unmerge_adapter()
    torch.manual_seed(0)
    drops.train()
    with torch.no_grad():
        several = [bench.run(drops) for _ in range(6)]
    assert any(not torch.equal(y, several[0]) for y in several), f"{name} has no effect"


def stacks_with_another(bench: Bench) -> None:
    """Two active adapters are one folded weight, in either order; one that hides is refused."""
    model = bench.model()
    for order in ("a0", "a1"), ("a1", "a0"):
        shared = [h for h in model.base_model.hosts().values() if h.parts(order[:1])]
        if any(part.instead() is not None for host in shared for part in host.parts(order[1:])):
            _refuses(partial(model.set_adapter, list(order)), "in place of", StateError)
            continue
        model.set_adapter(list(order))
        both = bench.run(model)
        for name in order:
            with model.using(name):
                assert not torch.allclose(bench.run(model), both), f"{name} alone is both"
        if bench.forbids("merge"):
            _refuses(model.merge_adapter, "cannot be merged")
            continue
        model.merge_adapter()
        close(bench.run(model), both)
        model.unmerge_adapter()
        assert torch.equal(bench.run(model), both)


def mixes_in_a_batch(bench: Bench) -> None:
    """Each row of a mixed batch is as alone; of an adapter that looks at the rows together, all of
    its rows are as they are without the others.
    """
    model = bench.model()
    rows = ["a1", "a0", "__base__", "a0"]
    mixed = bench.run(model, adapter_names=rows)
    for name in dict.fromkeys(rows):
        index = [i for i, own in enumerate(rows) if own == name]
        together = any(part.together for part in parts_of(model, name))
        with model.using(*([] if name == "__base__" else [name])):
            for own in [index] if together else [[i] for i in index]:
                close(mixed[own], bench.run(model, own))


def _base_tensors(model: PeftModel) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".adapters." not in n}


LAWS: dict[str, Callable[[Bench], None]] = {
    law.__name__: law
    for law in (
        has_an_effect,
        forward_is_the_folded_weight,
        gradients_reach_the_adapter_alone,
        unloading_gives_back_the_model,
        saving_keeps_every_bit,
        copies_are_the_same_model,
    )
}
