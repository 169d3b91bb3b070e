"""Short sequences that have once shown a defect, and what no sequence of one model shows."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from ground import Op
from machine import SequenceError, explore, replay
from zoo import IDS, ZOO, Net

from graftwork import LoraConfig, StateError, get_peft_model
from graftwork.engine.host import Host
from graftwork.engine.root import Grafted
from graftwork.engine.switch import Switch
from graftwork.fast.flags import Flags
from graftwork.model import functional

A_THEN_B = [("attach", "lora", "a", False), ("add", "ia3", "b", False)]
HEADS = [("attach", "lora_biases", "a", False), ("add", "lora_saving", "b", False)]
ADALORA = [("attach", "adalora", "a", False), ("save", "whole", None), ("train", 1), ("train", 2),
           ("train", 3), ("save", "pruned", None)]  # fmt: skip
SEQUENCES: dict[str, list[Op]] = {
    "C4: one hides the other in a scope": [*HEADS, ("using", ["a", "b"]), ("using", ["b", "a"])],
    "D5: one hides the other when merged": [*HEADS, ("merge", ["a", "b"], True)],
    "D5: one hides the other that is merged": [
        *HEADS, ("merge", ["a"], True), ("merge", ["b"], True), ("unmerge",)
    ],
    "D3: merged for good, and then another": [
        *A_THEN_B, ("merge", ["a"], False), ("merge", ["b"], True)
    ],
    "D3: merged for good elsewhere": [
        ("attach", "lora", "a", False), ("add", "rslora", "b", False),
        ("add", "ln_tuning", "c", False), ("merge", ["a"], False), ("merge", ["c"], True),
        ("finish", ["c"]), ("finish", ["a"]),
    ],
    "C3: the adapter of before is deleted": [
        *A_THEN_B, ("merge", ["b"], True), ("delete", ["a"]), ("unmerge",)
    ],
    "C3: one of those of before is deleted": [
        *A_THEN_B, ("add", "loha", "c", False), ("choose", ["a", "c"], False),
        ("merge", ["b"], True), ("delete", ["c"]), ("unmerge",),
    ],
    "C2: chosen while it is merged": [
        *A_THEN_B, ("merge", ["b"], True), ("choose", ["b"], False), ("unmerge",)
    ],
    "C4: a name twice": [
        *A_THEN_B, ("choose", ["b", "b"], False), ("using", ["a", "a"]),
        ("merge", ["a", "a"], True), ("unmerge",), ("delete", ["a", "a"]),
    ],
    "A10: the base trained before": [
        *A_THEN_B[:1], ("delete", ["a"]), ("add", "ia3", "b", False), ("unload",)
    ],
    "F7: loaded into a merged one": [
        *A_THEN_B, ("save", "s", ["a"]), ("train", 1), ("merge", ["a"], True),
        ("load", "s", "a", "a", True), ("swap", "s", "a", "a"), ("unmerge",),
        ("load", "s", "a", "a", True),
    ],
    "F4: no row has an adapter, in training": [
        *A_THEN_B, ("mode", True), ("rows", ["__base__"] * 4), ("rows", ["b"] * 4)
    ],
    "C3: deleted after a mixed batch": [
        *A_THEN_B, ("rows", ["a", "b", "a", "__base__"]), ("delete", ["b"]), ("delete", ["a"])
    ],
    "E3: combined of wide and narrow layers": [
        ("attach", "boft", "a", False), ("combine", ["a"], [1.0], "b", "linear")
    ],
    "E3: combined with an embedding and a bias": [
        ("attach", "lora_embedding", "a", False), ("add", "ia3_head", "b", False),
        ("combine", ["a", "b"], [0.5, 1.0], "c", "linear"), ("save", "s", ["c"]),
        ("load", "s", "c", "d", False), ("choose", ["d"], False), ("train", 1),
    ],
    "E3: combined with what is trained as a whole": [
        ("attach", "rslora", "a", False), ("add", "lora_saving", "b", False),
        ("combine", ["a", "b"], [1.0, 0.5], "c", "linear"), ("choose", ["c"], False),
    ],
    "E3: combined with tokens": [
        ("attach", "lora_embedding", "a", False), ("add", "lora_tokens", "b", False),
        ("combine", ["a", "b"], [1.0, 0.5], "c", "cat"), ("choose", ["c"], False),
    ],
    "C1: a step in eval() after a forward of others": [
        ("attach", "prompt", "a", False), ("combine", ["a"], [0.5], "b", "linear"),
        ("mode", True), ("choose", ["a", "b"], False), ("rows", ["a", "__base__", "b", "a"]),
        ("mode", False), ("choose", ["b"], False), ("require", ["a"], True), ("train", 788),
    ],
    "A9: a step while some of a schedule's layers are merged": [
        ("attach", "hra", "a", False), ("add", "adalora", "b", False),
        ("choose", ["b", "a"], False), ("train", 48), ("add", "ln_tuning", "c", False),
        ("merge", None, True), ("choose", ["c", "b"], False), ("train", 100),
    ],
    "E3: combined with a bias of what another copies": [
        *HEADS, ("combine", ["b", "a"], [-0.5, 1.0], "c", "linear"), ("choose", ["c"], False),
    ],
    "E3: combined with tokens of what another copies": [
        ("attach", "lora_saving_embedding", "a", False), ("add", "lora_tokens", "b", False),
        ("combine", ["a", "b"], [1.0, 0.5], "c", "linear"), ("choose", ["c"], False),
    ],
    "E3: combined of a LoRA beneath its own tokens": [
        ("attach", "lora_under_tokens", "a", False), ("combine", ["a"], [0.5], "b", "linear"),
        ("add", "lora_saving_embedding", "c", False),
        ("combine", ["a", "c"], [0.5, 1.0], "d", "linear"), ("choose", ["d"], False),
    ],
    "A9: all triplets into a masked adapter": [*ADALORA, ("load", "whole", "a", "a", False),
                                           ("save", "again", ["a"])],
    "A9: a schedule's state into fewer triplets": [
        *ADALORA, ("load", "pruned", "a", "b", False), ("load", "pruned", "a", "b", True),
        ("load", "whole", "a", "b", False), ("load", "pruned", "a", "b", False),
    ],
    "A9: saved while it is frozen": [
        *ADALORA, ("add", "ia3", "b", False), ("choose", ["b"], False), ("save", "s", ["a"]),
        ("load", "s", "a", "c", True), ("choose", ["c"], False), ("train", 4),
    ],
}  # fmt: skip


def faults(names: dict[str, Any]) -> list[Any]:
    """The names as parameters, marked with the faults that they begin with."""
    return [pytest.param(n, marks=pytest.mark.fault(n.partition(":")[0])) for n in names]


@pytest.mark.fault("E3")
def test_an_adapter_whose_triplets_are_all_pruned_somewhere_is_combined() -> None:
    replay(
        20049, ("attach", "ia3_head", "weight", False), ("save", "s0", None),
        ("choose", ["weight"], False), ("using", ["weight"]), ("add", "adalora", "aa", False),
        ("delete", ["weight"]), ("train", 845), ("train", 155), ("save", "s0", None), ("unload",),
        ("attach_saved", "s0", "weight", "keys", True), ("load", "s0", "aa", "a", False),
        ("combine", ["a", "keys"], [0.5, 0.5], "lora_A", "linear"),
    )  # fmt: skip


TIED: dict[str, list[Op]] = {
    "C4: a copy at a tied end hides another": [
        ("attach", "lora_saving_tied", "a", False), ("add", "lokr", "b", False),
        ("using", ["a", "b"]), ("using", ["b", "a"]), ("merge", ["b", "a"], True),
    ],
    "F7: both ends swapped when the tie is gone": [
        ("attach", "tokens", "a", False), ("add", "ia3_head", "b", False),
        ("merge", ["b"], False), ("save", "s", ["a"]), ("train", 1), ("swap", "s", "a", "a"),
    ],
    "F7: both ends swapped": [
        ("attach", "lora_tied", "a", False), ("save", "s", ["a"]), ("train", 1),
        ("swap", "s", "a", "a"), ("train", 2), ("merge", ["a"], True), ("finish", ["a"]),
    ],
    "A5: tokens beneath a LoRA at the other end": [
        ("attach", "lora_over_tokens", "a", False), ("train", 1), ("save", "s", ["a"]),
        ("load", "s", "a", "b", True), ("merge", ["a"], True), ("unmerge",), ("finish", ["a"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", faults(TIED))
def test_a_sequence_at_a_tied_weight_that_once_failed(name: str) -> None:
    for seed in (3, 7, 11):  # in each dtype
        replay(seed, *TIED[name])


@pytest.mark.parametrize("name", faults(SEQUENCES))
def test_a_sequence_that_once_failed(name: str) -> None:
    for seed in range(3):  # in each dtype
        replay(seed, *SEQUENCES[name])


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine sees faults that are planted, and shows how to come to them."""

    def planted(owner: Any, name: str, value: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(SequenceError) as found:
                explore(2000, seed=7, length=25)
        return str(found.value)

    def write(self: Flags, names: Any, on: bool, find: Any) -> None:
        plain(self, names, True, find)  # nobody is ever frozen

    plain = Flags.write
    assert "requires_grad of" in planted(Flags, "write", write)

    def restore(self: Host) -> None:
        self.originals, self.merged_adapters = {}, ()

    assert "('unmerge'" in planted(Host, "restore", restore)
    once = Switch.activate

    def activate(self: Switch, names: Any = None, enabled: Any = None) -> None:
        once(self, names, None)

    assert "('enable', False)" in planted(Switch, "activate", activate)
    rename = Grafted.rename_adapter

    def forgetful(self: Grafted, old: str, new: str) -> None:
        active = self.switch.active
        rename(self, old, new)
        self.switch.activate(active)

    assert "('rename'" in planted(Grafted, "rename_adapter", forgetful)


@pytest.mark.fault("C3")
def test_a_thousand_come_and_go_and_leave_nothing() -> None:
    model = get_peft_model(Net(tied=True), LoraConfig(r=2, target_modules=["q_proj"]), "stays")

    def held() -> tuple[Any, ...]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks) if h]
        return len(tensors), len(hooks), list(model.state_dict()), len(list(model.modules()))

    def come_and_go(i: int) -> None:
        model.add_adapter("x", ZOO[labels[i % len(labels)]]())
        with torch.no_grad():
            model(IDS, adapter_names=["x", "stays", "x", "__base__"])
        model.delete_adapter("x")

    labels = list(ZOO)
    for i in range(len(labels)):
        come_and_go(i)
    before = held()
    for i in range(35 * len(labels)):  # a good thousand
        come_and_go(i)
    assert held() == before


@pytest.mark.fault("C2")
def test_no_name_that_is_wrong_does_nothing() -> None:
    model = functional.inject_adapter_in_model(ZOO["lora"](), Net(), "a")
    with pytest.raises(StateError, match="no adapter 'b'"):
        functional.set_requires_grad(model, "b", False)
    functional.set_requires_grad(model, ["a"], False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.fault("E3")
def test_a_bias_that_nothing_can_hold_is_told() -> None:
    model = get_peft_model(Net(), ZOO["lora_bias"](), "a")
    model.add_adapter(
        "b", LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["down_proj"])
    )
    before = set(model.state_dict())
    with pytest.raises(StateError, match="update of down_proj has a bias and the layer has none"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "linear")
    assert list(model.peft_config) == ["a", "b"] and set(model.state_dict()) == before
