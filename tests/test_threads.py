"""Threads run one model while others change its adapters: each output is the old or the new."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from graftwork import (
    AdapterCache,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    StateError,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from graftwork.testing.bench import shake

IDS = tiny.IDS
LONG = 60  # seconds that nothing takes, unless threads wait for each other
TARGETS = ["q_proj", "k_proj", "down_proj"]


class Work(threading.Thread):
    """A thread that gives its result, or what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result, self.error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error  # type: ignore[assignment]

    def end(self) -> Any:
        """The result, once it is there."""
        self.join(LONG)
        assert not self.is_alive(), "it waits for ever"
        if self.error is not None:
            raise self.error
        return self.result


def lora(seed: int, **options: Any) -> LoraConfig:
    return LoraConfig(r=2 + seed % 2, target_modules=TARGETS, **options)


def built(*names: str) -> Any:
    """A model with LoRAs, each with values of its own; the first is active."""
    model: Any = get_peft_model(tiny.build("llama"), lora(0), names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(0))
    for i, name in enumerate(names):
        model.set_adapter(name)
        shake(model, seed=i + 1)
    model.set_adapter(names[0])
    return model.eval()


@torch.no_grad()
def answer(model: Any, *names: str) -> Tensor:
    """Its logits with the adapters that are active, or with these."""
    if not names:
        return model(IDS).logits
    with model.using(*names):
        return model(IDS).logits


@contextmanager
def paused(model: Any, work: Callable[[], Any]) -> Iterator[tuple[Work, Callable[[], Any]]]:
    """A thread that stands between the model's two blocks, and what lets it go on to its end."""
    there, go = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread() is thread:
            there.set()
            assert go.wait(LONG)

    ready = threading.Event()
    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(stop)
    thread = Work(lambda: ready.wait(LONG) and work())
    ready.set()

    def end() -> Any:
        go.set()
        return thread.end()

    try:
        assert there.wait(LONG)
        yield thread, end
    finally:
        go.set()
        hook.remove()


def waits(model: Any, other: Work) -> None:
    """Until a thread waits for its turn to change the model."""
    turns, until = model.base_model.switch.turns, time.monotonic() + LONG
    while not (turns.by == other.ident and not turns.begun):
        assert other.is_alive() and time.monotonic() < until, "it does not wait for the forward"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved adapters: x, y and z."""
    folder = tmp_path_factory.mktemp("shelf")
    model = built("w", "v", "x", "y", "z")
    model.save_pretrained(folder)
    return folder


Verb = Callable[[Any, Path], Any]
# what has to wait for a forward with "a"
WAITING: dict[str, Verb] = {
    "delete": lambda m, f: m.delete_adapter("a"),
    "rename": lambda m, f: m.rename_adapter("a", "c"),
    "hotswap": lambda m, f: m.hotswap_adapter(f / "x", "a"),
    "load": lambda m, f: m.load_adapter(f / "x", "a"),
    "state dict": lambda m, f: set_peft_model_state_dict(
        m, get_peft_model_state_dict(m, adapter_name="b"), "a"
    ),
    "resize": lambda m, f: m.resize_adapter("a", rank=1),
    "merge": lambda m, f: m.merge_adapter(),
    "merge another": lambda m, f: m.merge_adapter(["b"]),
    "merge for good": lambda m, f: m.merge_adapter(["b"], keep=False),
}
# what concerns nobody who is running
FREE: dict[str, Verb] = {
    "set": lambda m, f: m.set_adapter("b"),
    "set both": lambda m, f: m.set_adapter(["b", "a"]),
    "disable": lambda m, f: m.base_model.disable_adapter_layers(),
    "add": lambda m, f: m.add_adapter("c", lora(1)),
    "load": lambda m, f: m.load_adapter(f / "x", "c"),
    "load and set": lambda m, f: (m.load_adapter(f / "x", "c"), m.set_adapter("c")),
    "delete another": lambda m, f: m.delete_adapter("b"),
    "swap another": lambda m, f: m.hotswap_adapter(f / "x", "b"),
    "combine": lambda m, f: m.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat"),
    "convert": lambda m, f: m.to_lora("b", "c"),
    "save": lambda m, f: m.save_pretrained(f.parent / "saved"),
}


@pytest.mark.fault("F8")
@pytest.mark.filterwarnings("ignore:the active adapter")
@pytest.mark.parametrize("name", WAITING)
def test_a_change_waits_for_the_forwards_that_it_concerns(name: str, shelf: Path) -> None:
    model = built("a", "b")
    twin = copy.deepcopy(model)
    old = answer(model)
    with paused(model, lambda: answer(model)) as (_, end):
        other = Work(lambda: WAITING[name](model, shelf))
        waits(model, other)
        assert torch.equal(end(), old)
    other.end()
    WAITING[name](twin, shelf)
    assert torch.equal(answer(model), answer(twin))
    assert not model.base_model.switch.turns.running


@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", FREE)
def test_other_changes_wait_for_nobody_and_take_effect_after(name: str, shelf: Path) -> None:
    model = built("a", "b")
    twin = copy.deepcopy(model)
    old = answer(model)
    with paused(model, lambda: answer(model)) as (thread, end):
        Work(lambda: FREE[name](model, shelf)).end()
        assert thread.is_alive()
        assert torch.equal(end(), old)
    FREE[name](twin, shelf)
    assert torch.equal(answer(model), answer(twin))


def test_a_model_that_had_no_adapter_left_gets_one(shelf: Path) -> None:
    model = built("a")
    model.delete_adapter("a")
    plain = answer(model)
    with paused(model, lambda: answer(model)) as (_, end):
        Work(lambda: model.load_adapter(shelf / "x", "c")).end()
        assert torch.equal(end(), plain)
    assert not torch.equal(answer(model), plain)


@pytest.mark.fault("F8")
def test_forwards_with_other_adapters_go_on_while_one_is_changed(shelf: Path) -> None:
    model = built("a", "b")
    old, beside = answer(model), answer(model, "b")
    with paused(model, lambda: answer(model)) as (_, end):
        swap = Work(lambda: model.hotswap_adapter(shelf / "x", "a"))
        waits(model, swap)
        late = Work(lambda: answer(model, "a"))
        assert torch.equal(Work(lambda: answer(model, "b")).end(), beside)
        assert late.is_alive() and swap.is_alive()
        assert torch.equal(end(), old)
    swap.end()
    new = answer(model)
    assert torch.equal(late.end(), new) and not torch.equal(new, old)


def test_a_mixed_batch_and_generation_are_waited_for_too(shelf: Path) -> None:
    model = built("a", "b")
    rows = ["b", "a"]
    model.set_adapter("b")

    def generate() -> Any:
        return model.generate(IDS, adapter_names=rows, max_new_tokens=4, do_sample=False)

    with torch.no_grad():
        mixed, tokens = model(IDS, adapter_names=rows).logits, generate()
    work: dict[Any, Any] = {
        lambda: torch.no_grad()(model)(IDS, adapter_names=rows).logits: mixed,
        generate: tokens,
    }
    for run, old in work.items():
        with paused(model, run) as (_, end):
            swap = Work(lambda: model.hotswap_adapter(shelf / "x", "a"))
            waits(model, swap)
            assert torch.equal(end(), old)
        swap.end()
        first = get_peft_model_state_dict(built("a", "b"), None, "a")
        set_peft_model_state_dict(model, first, "a")


def test_what_is_being_loaded_is_there_as_a_whole_or_not_at_all(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork.files import codec

    model = built("a")
    there, go, fill = threading.Event(), threading.Event(), codec.fill

    def slow(*arguments: Any) -> None:
        there.set()
        assert go.wait(LONG)
        fill(*arguments)

    monkeypatch.setattr(codec, "fill", slow)
    load = Work(lambda: model.load_adapter(shelf / "x", "x"))
    assert there.wait(LONG)
    early = Work(lambda: answer(model, "x"))
    assert torch.equal(Work(lambda: answer(model)).end(), answer(model))
    assert early.is_alive()
    go.set()
    load.end()
    assert torch.equal(early.end(), answer(model, "x"))

    def broken(*_: Any) -> None:
        there.set()
        assert go.wait(LONG)
        raise OSError("the disk is gone")

    there.clear(), go.clear()
    monkeypatch.setattr(codec, "fill", broken)
    load = Work(lambda: model.load_adapter(shelf / "y", "y"))
    assert there.wait(LONG)
    early = Work(lambda: answer(model, "y"))
    go.set()
    with pytest.raises(OSError, match="the disk is gone"):
        load.end()
    with pytest.raises(StateError, match="there is no adapter 'y'"):
        early.end()


@pytest.mark.fault("C3")
def test_an_adapter_that_was_deleted_meanwhile_is_an_error_and_not_the_base(shelf: Path) -> None:
    model = built("a", "b")
    with torch.no_grad(), model.using("b"):
        model(IDS)
        Work(lambda: model.delete_adapter("b")).end()
        with pytest.raises(StateError, match="there is no adapter 'b'; this model has"):
            model(IDS)
    with torch.no_grad():
        model(IDS)
    assert not model.base_model.switch.turns.running


def test_a_forward_may_change_adapters_itself_but_not_against_another_thread(shelf: Path) -> None:
    model = built("a", "b")
    wanted = answer(model, "b")
    inner = model.get_base_model().model
    hook = inner.register_forward_pre_hook(lambda *_: model.set_adapter("b"))
    assert torch.equal(answer(model), wanted)  # of its own thread, and before any layer
    hook.remove()
    with paused(model, lambda: answer(model, "b")) as (_, end):
        other = Work(lambda: model.hotswap_adapter(shelf / "x", "b"))
        waits(model, other)
        hook = inner.register_forward_pre_hook(lambda *_: model.set_adapter("a"))
        with pytest.raises(StateError, match="from within a forward of the model"):
            answer(model, "a")
        hook.remove()
        end()
    other.end()


# -- eight threads


def eight() -> Any:
    """A model with eight adapters of as many kinds, all of which train."""
    model: Any = get_peft_model(tiny.build("llama"), lora(0), "lora")
    for name, config in {
        "dora": lora(1, use_dora=True),
        "rs": lora(1, use_rslora=True, bias="lora_only", modules_to_save=["lm_head"]),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "loha": LoHaConfig(r=2, target_modules=TARGETS),
        "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }.items():
        model.add_adapter(name, config)
    names = list(model.peft_config)
    model.set_requires_grad(names)
    shake(model, 0.05)
    return model.eval()


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """What eight threads give that begin at once."""
    barrier = threading.Barrier(len(works))
    threads = [Work(lambda one=one: (barrier.wait(LONG), one())[1]) for one in works]
    return [thread.end() for thread in threads]


@pytest.mark.fault("F8")
@pytest.mark.fault("C4")
def test_eight_threads_with_eight_adapters_answer_as_one_thread_does() -> None:
    model = eight()
    names = list(model.peft_config)
    assert len(names) == 8
    plain = [n for n in names if n != "prompt"]

    @torch.no_grad()
    def work(name: str) -> list[Tensor]:
        mixed = [name if name in plain else "__base__", "lora"]
        out = [answer(model, name), model(IDS, adapter_names=mixed).logits]
        with model.using(name):
            out.append(model.generate(IDS, max_new_tokens=4, do_sample=False))
        with model.disable_adapter():
            out.append(model(IDS).logits)
        return [*out, answer(model)]

    wanted = {name: work(name) for name in names}
    for _ in range(3):
        found = together([lambda name=name: work(name) for name in names])
        for name, out in zip(names, found, strict=True):
            assert all(map(torch.equal, out, wanted[name])), name


@pytest.mark.fault("F8")
@pytest.mark.fault("C1")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_eight_threads_train_eight_adapters_as_one_thread_does(checkpointing: bool) -> None:
    def train(model: Any, name: str) -> list[float]:
        own = [
            p for n, p in model.named_parameters() if f".adapters.{name}." in n and p.requires_grad
        ]
        optimizer, losses = torch.optim.AdamW(own, lr=0.01), []
        for _ in range(4):
            with model.using(name):
                loss = model(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first = eight().train()
    if checkpointing:
        tiny.enable_checkpointing(first.get_base_model(), {"use_reentrant": False})
        first.enable_input_require_grads()
    second = copy.deepcopy(first)
    names = list(first.peft_config)
    wanted = [train(first, name) for name in names]
    assert together([lambda n=n: train(second, n) for n in names]) == wanted
    one, other = first.state_dict(), second.state_dict()
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_schedules_of_other_threads_are_none_of_ones_business() -> None:
    from graftwork import AdaLoraConfig

    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=TARGETS)
    model: Any = get_peft_model(tiny.build("llama"), config, "a")
    model.add_adapter("b", config)
    model.set_requires_grad(["a", "b"])
    model.train()
    own = next(p for n, p in model.named_parameters() if ".b." in n)
    for _ in range(4):  # as if another thread were within its step, time and again
        with torch.no_grad():
            own.add_(0.01)
        model(IDS, labels=IDS).loss.backward()


# -- all at once


@pytest.mark.slow
@pytest.mark.fault("F8")
@pytest.mark.fault("F7")
@pytest.mark.filterwarnings("ignore")
def test_whatever_happens_an_output_is_an_old_or_a_new_one(shelf: Path) -> None:
    rounds = 150
    model = built("a", "b", "s", "m")
    names = ("a", "b", "s", "m", "r1", "r2", "new")
    allowed: dict[str, list[Tensor]] = {n: [answer(model, n)] for n in ("a", "b", "s", "m")}
    for folder in "xy":
        twin = copy.deepcopy(model)
        twin.hotswap_adapter(shelf / folder, "s")
        allowed["s"].append(answer(twin, "s"))
        allowed.setdefault("new", []).append(answer(twin, "s"))
    twin = copy.deepcopy(model)
    twin.load_adapter(shelf / "z", "r1")
    allowed["r1"] = allowed["r2"] = [answer(twin, "r1")]
    twin = copy.deepcopy(model)
    twin.merge_adapter(["m"])
    allowed["m"].append(answer(twin, "m"))
    standing = [tensor for own in allowed.values() for tensor in own]
    done, seen = threading.Event(), {name: 0 for name in (*names, "active", "refused")}

    def reader(seed: int) -> None:
        draw = random.Random(seed)
        while not done.is_set():
            name = draw.choice([*names, "active"])
            try:
                found = answer(model, *([] if name == "active" else [name]))
            except StateError as error:
                assert "there is no adapter" in str(error)
                seen["refused"] += 1
                continue
            options = standing if name == "active" else allowed[name]
            assert any(torch.equal(found, one) for one in options), name
            seen[name] += 1

    def writer(seed: int) -> int:
        draw, changed = random.Random(seed), 0
        verbs: list[Callable[[], Any]] = [
            lambda: model.hotswap_adapter(shelf / draw.choice("xy"), "s"),
            lambda: model.load_adapter(shelf / draw.choice("xy"), "new"),
            lambda: model.delete_adapter("new"),
            lambda: model.load_adapter(shelf / "z", "r1"),
            lambda: model.rename_adapter("r1", "r2"),
            lambda: model.delete_adapter("r2"),
            lambda: model.set_adapter(draw.choice(["a", "b", "s", "m"])),
            lambda: model.merge_adapter(["m"]),
            lambda: model.unmerge_adapter(),
        ]
        for _ in range(rounds):
            try:
                draw.choice(verbs)()
                changed += 1
            except StateError:  # of a name that another thread has taken or deleted
                pass
        return changed

    readers = [Work(lambda i=i: reader(i)) for i in range(6)]
    writers = [Work(lambda i=i: writer(100 + i)) for i in range(2)]
    changed = 0
    try:
        for thread in writers:
            thread.join(8 * LONG)
            changed += thread.end()
    finally:
        done.set()
    for thread in readers:
        thread.end()
    assert changed > rounds // 2 and all(seen[n] for n in ("a", "s", "m", "active")), seen
    assert not model.base_model.switch.turns.running


@pytest.mark.fault("F1")
def test_a_cache_serves_while_adapters_come_and_go(shelf: Path) -> None:
    cache = AdapterCache(built("a"), shelf, capacity=2, timeout=LONG)
    wanted = {}
    for name in "xyz":
        one = PeftModel.from_pretrained(tiny.build("llama"), shelf / name, adapter_name=name)
        wanted[name] = answer(one)

    def work(order: str) -> None:
        for name in order:
            with cache.use(name) as model, torch.no_grad():
                assert torch.equal(model(IDS).logits, wanted[name])

    together([lambda order=order: work(order) for order in ("xyzx", "zyxz", "yxzy", "zzxy")])
    assert cache.model.active_adapters == ["a"]


def test_prefixes_are_chosen_by_thread() -> None:
    model: Any = get_peft_model(
        tiny.build("llama"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "p"
    )
    model.add_adapter("q", PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.set_requires_grad(["p", "q"])
    shake(model.eval())
    wanted = {name: answer(model, name) for name in "pq"}
    for _ in range(3):
        found = together([lambda n=n: answer(model, n) for n in "pqpq"])
        for name, out in zip("pqpq", found, strict=True):
            assert torch.equal(out, wanted[name])
