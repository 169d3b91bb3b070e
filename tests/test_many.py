"""Many adapters: what loading and switching touch is counted, however many there are."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from graftwork import (
    AdapterCache,
    FileError,
    IA3Config,
    LoraConfig,
    PeftModel,
    StateError,
    get_peft_model,
)
from graftwork.engine import inject as injection
from graftwork.engine import tree
from graftwork.engine.host import Host
from graftwork.fast.pause import uncollected
from graftwork.files import codec, mapped
from graftwork.model.functional import inject_adapter_in_model, set_adapter
from graftwork.patterns import pattern_matches, patterns

CONFIG = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
IDS = torch.arange(12).reshape(3, 4)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four saved adapters that differ, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("shelf")
    for i, name in enumerate("abcd"):
        torch.manual_seed(i)
        get_peft_model(tiny.build("llama"), LoraConfig(**CONFIG)).save_pretrained(folder / name)
    return folder


def loaded(shelf: Path, names: str) -> PeftModel:
    first, *more = names
    model = PeftModel.from_pretrained(tiny.build("llama"), shelf / first, adapter_name=first)
    for name in more:
        model.load_adapter(shelf / name, name)
    return model


def trained(model: nn.Module) -> dict[str, set[bool]]:
    """Adapter -> the flags of its tensors."""
    flags: dict[str, set[bool]] = {}
    for host in tree.hosts(model).values():
        for name, parts in host.adapters._modules.items():
            assert parts is not None
            flags.setdefault(name, set()).update(p.requires_grad for p in parts.parameters())
    return flags


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class Visits:
    """Counts the modules that a call visits, and the files that it opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.modules, self.files = 0, []  # type: ignore[var-annotated]
        walk, named, opened = tree.walk, nn.Module.named_modules, mapped.layout

        def counted(found: Any) -> Any:
            for one in found:
                self.modules += 1
                yield one

        def open_file(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.files.append(Path(path).name)
            return opened(path, *args, **kwargs)

        def walked(*args: Any) -> Any:
            return counted(walk(*args))

        for name in ("engine.tree", "engine.inject", "engine.root", "targets.offer"):
            monkeypatch.setattr(f"graftwork.{name}.walk", walked)
        for name in ("targets.replicas", "files.codec", "model.peft_model"):
            monkeypatch.setattr(f"graftwork.{name}.walk", walked)
        monkeypatch.setattr(nn.Module, "named_modules", lambda *a, **k: counted(named(*a, **k)))
        monkeypatch.setattr(mapped, "layout", open_file)
        parts_of = Host.parts_of

        def asked(*args: Any) -> Any:
            self.modules += 1
            return parts_of(*args)

        monkeypatch.setattr(Host, "parts_of", asked)

    def of(self, run: Any) -> int:
        before = self.modules
        run()
        return self.modules - before


# -- loading


@pytest.mark.fault("F1")
def test_loading_visits_as_many_modules_for_the_last_adapter_as_for_the_second(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(shelf, "a")
    visits = Visits(monkeypatch)
    counts = [visits.of(lambda: model.load_adapter(shelf / "b", f"b{i}")) for i in range(12)]  # noqa: B023
    assert counts[0] > 0 and set(counts) == {counts[0]}
    sites, modules = len(tree.hosts(model)), sum(1 for _ in tree.walk(model))
    assert counts[0] < 12 * modules + 8 * sites
    again = [visits.of(lambda: model.load_adapter(shelf / "c", "b0"))]
    swapped = [visits.of(lambda: model.hotswap_adapter(shelf / "d", "b0"))]
    deleted = [visits.of(lambda: model.delete_adapter(f"b{i}")) for i in range(6, 12)]  # noqa: B023
    again.append(visits.of(lambda: model.load_adapter(shelf / "c", "b0")))
    swapped.append(visits.of(lambda: model.hotswap_adapter(shelf / "d", "b0")))
    assert len(set(again)) == len(set(swapped)) == len(set(deleted)) == 1


@pytest.mark.fault("F3")
def test_loading_opens_a_file_once(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(shelf, "a")
    visits = Visits(monkeypatch)
    model.load_adapter(shelf / "b", "b")
    assert visits.files == ["adapter_model.safetensors"]


@pytest.mark.fault("F2")
def test_nothing_is_drawn_or_written_twice_where_a_file_follows(shelf: Path) -> None:
    model = loaded(shelf, "a")
    random, parts = torch.get_rng_state(), 2 * len(tree.hosts(model))
    with Operations() as operations:
        model.load_adapter(shelf / "b", "b")
    assert torch.equal(torch.get_rng_state(), random)
    counts = operations.counts
    assert not {"uniform_", "normal_", "zero_", "fill_", "zeros", "ones", "clone"} & set(counts)
    sampled = 16  # weights by which the base model is recognised
    assert parts <= counts["copy_"] <= parts + sampled * 2  # once each, out of the mapped file
    assert counts["empty"] <= parts + 2


@pytest.mark.fault("F3")
@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_loaded_values_are_the_file_s_and_belong_to_the_model(method: str, tmp_path: Path) -> None:
    config = LoraConfig(**CONFIG) if method == "LORA" else IA3Config(init_ia3_weights=False)
    saved = get_peft_model(tiny.build("llama"), config)
    saved.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    for name, tensor in codec.state(saved.get_base_model(), "default").items():
        mine = codec.state(back.get_base_model(), "default")[name]
        assert torch.equal(mine, tensor)
        assert mine.untyped_storage().nbytes() == mine.nbytes  # no view of the whole file
    (tmp_path / "adapter_model.safetensors").unlink()  # nothing depends on it
    assert torch.equal(saved.eval()(IDS).logits, back(IDS).logits)


def test_a_model_in_training_mode_is_set_to_eval_by_loading(shelf: Path) -> None:
    model = loaded(shelf, "ab").train()
    model.load_adapter(shelf / "c", "c")
    assert not any(m.training for m in model.modules())
    model.get_base_model().train()  # the wrapper has not been told
    model.load_adapter(shelf / "d", "d")
    assert not any(m.training for m in model.modules())


# -- reading


@pytest.mark.parametrize("dtype", [*mapped.DTYPES.values(), torch.float8_e4m3fn], ids=str)
def test_a_mapped_file_is_read_as_safetensors_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = torch.arange(6).remainder(2).to(dtype)
    tensors = {
        "a": values.reshape(2, 3),
        "b": values[:1].clone(),
        "c": values[:0].clone(),
        "d": values[0].clone(),
    }
    path = tmp_path / "x.safetensors"
    save_file({**tensors, "odd": torch.tensor([1, 2, 3], dtype=torch.uint8)}, path, {"k": "v"})
    found, metadata = mapped.read(path)
    wanted = load_file(path)
    assert metadata == {"k": "v"} and found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_tensors_at_odd_places_are_read(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path, values = tmp_path / "x.safetensors", torch.tensor([1.5, -2.0])
    for padding in range(4):
        head = text + b" " * padding
        path.write_bytes(len(head).to_bytes(8, "little") + head + values.numpy().tobytes())
        assert torch.equal(mapped.read(path)[0]["a"], values)


def test_changing_a_mapped_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    before = path.read_bytes()
    mapped.read(path)[0]["a"].fill_(1)
    gc.collect()
    assert path.read_bytes() == before


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, shelf: Path) -> None:
    whole = (shelf / "a" / "adapter_model.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    for data in (b"", whole[:4], whole[:200], whole[:-1], whole + b"x"):
        path.write_bytes(data)
        with pytest.raises(FileError, match=r"x\.safetensors is damaged"):
            mapped.read(path)


# -- switching


def test_switching_walks_over_nothing(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(shelf, "abcd")
    visits = Visits(monkeypatch)
    monkeypatch.setattr(nn.Module, "parameters", lambda *_: pytest.fail("a walk over parameters"))
    assert visits.of(lambda: model.set_adapter("b")) == 0
    assert visits.of(lambda: model.set_adapter(["c", "a"])) == 0
    assert visits.of(lambda: model.set_requires_grad("d")) == 0


def test_only_adapters_that_change_are_written(shelf: Path) -> None:
    model = loaded(shelf, "abcd")
    model.set_adapter("a")
    flags = model.base_model.switch.flags
    written: list[tuple[tuple[str, ...], bool]] = []
    write = flags.write
    flags.write = lambda names, on, find: (  # type: ignore[method-assign]
        written.append((tuple(names), on)),
        write(written[-1][0], on, find),
    )[1]
    model.set_adapter("b")
    assert written == [(("a",), False), (("b",), True)]


def test_flags_follow_every_change_of_structure(shelf: Path) -> None:
    model = loaded(shelf, "abc")

    def check(active: str, *others: str) -> None:
        model.set_adapter(active)
        assert trained(model) == {active: {True}, **dict.fromkeys(others, {False})}

    check("a", "b", "c")
    model.rename_adapter("a", "z")
    check("b", "z", "c")
    check("z", "b", "c")
    model.delete_adapter("b")
    model.load_adapter(shelf / "d", "b")
    check("b", "z", "c")
    model.to(torch.float64)
    check("c", "b", "z")
    model.base_model.rename_adapter("z", "a")
    for host in tree.hosts(model).values():  # what exchanges tensors: sharding, assignment
        for module in host.adapters.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = nn.Parameter(p.detach().clone(), p.requires_grad)
    check("a", "b", "c")
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    check("b", "a", "c")
    model.hotswap_adapter(shelf / "c", "a")
    check("a", "b", "c")
    model.add_adapter("e", IA3Config())
    check("e", "a", "b", "c")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_flags_of_its_own(copied: Any, shelf: Path) -> None:
    model = loaded(shelf, "abc")
    model.set_adapter("a")
    other = copied(model)
    other.set_adapter("b")
    assert trained(other) == {"a": {False}, "b": {True}, "c": {False}}
    assert trained(model) == {"a": {True}, "b": {False}, "c": {False}}
    block = copy.deepcopy(model.get_base_model().model.layers[0])  # not the whole model's tensors
    assert {id(p) for p in block.parameters()}.isdisjoint(map(id, model.parameters()))
    size = len(pickle.dumps(block))
    assert size < 0.8 * len(pickle.dumps(model))


def test_what_was_unfrozen_otherwise_is_frozen_by_switching(shelf: Path) -> None:
    model = loaded(shelf, "abcd")
    model.set_requires_grad("c")
    for name, p in model.named_parameters():
        if ".b." in name:  # by hand
            p.requires_grad_(True)
    model.set_adapter("a")
    assert trained(model) == {"a": {True}, "b": {False}, "c": {False}, "d": {False}}
    for p in model.parameters():
        p.requires_grad_(True)
    model.set_adapter("d", inference_mode=True)
    assert set.union(*trained(model).values()) == {False}
    model.set_adapter("d")
    assert trained(model)["d"] == {True}


def test_a_layer_that_loses_an_adapter_is_no_trouble(shelf: Path) -> None:
    model = loaded(shelf, "ab")
    model.set_adapter("a")
    next(iter(model.base_model.hosts().values())).delete_adapter("a")
    model.set_adapter("b")
    assert trained(model) == {"a": {False}, "b": {True}}


def test_a_model_without_a_wrapper_switches_alike() -> None:
    model = tiny.build("llama")
    for name in "ab":
        inject_adapter_in_model(LoraConfig(**CONFIG), model, name)
    set_adapter(model, "b")
    assert trained(model) == {"a": {False}, "b": {True}}
    set_adapter(model, ["a", "b"])
    assert trained(model) == {"a": {True}, "b": {True}}


def test_adapters_that_hide_others_are_still_refused() -> None:
    model = get_peft_model(tiny.build("bert"), LoraConfig(r=2, modules_to_save=["classifier"]))
    model.add_adapter("b", LoraConfig(r=2, modules_to_save=["classifier"]))
    model.base_model.rename_adapter("b", "c")
    with pytest.raises(StateError, match="cannot be active together"):
        model.set_adapter(["default", "c"])
    assert model.active_adapters == ["default"]


# -- injecting


@pytest.mark.fault("F2")
def test_injecting_visits_each_module_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.build("llama")
    modules = sum(1 for _ in base.modules())
    visits = Visits(monkeypatch)
    made = visits.of(lambda: injection.inject(base, LoraConfig(**CONFIG), "a"))
    assert made < 18 * modules


def test_nothing_is_drawn_for_an_adapter_that_is_left_on_meta() -> None:
    base = tiny.build("llama")
    random = torch.get_rng_state()
    model = get_peft_model(base, LoraConfig(r=2), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in model.named_parameters() if ".adapters." in n)
    assert torch.equal(torch.get_rng_state(), random)


def test_patterns_that_are_looked_up_mean_what_each_means_by_itself() -> None:
    words = ["q", "q_proj", "proj", "layers.1.q_proj", r"layers\.1\.q_proj", r".*\.q_proj", "a|b",
             "a.b", "1.q", "q_proj.weight", "weight", r"layers\.[01]\.q", "x",
             "layers.1"]  # fmt: skip
    paths = ["q", "layers.1.q_proj", "layers.11.q_proj", "a", "b", "axb", "a.b", "c.a.b", "1xq",
             "layers.1.xq_proj", "layers.0.q", "layers.1", "m.weight"]  # fmt: skip
    known = patterns(*words)
    for path in paths:
        for parameter in ("weight", "experts.w1", "q"):
            one_by_one = [w for w in words if pattern_matches(w, path, parameter)]
            assert list(known.meaning(path, parameter)) == one_by_one
            old = [w for w in words if re.match(rf"(.*\.)?({w})$", path)]
            assert set(old) <= set(one_by_one)


def test_the_collector_of_garbage_waits_and_goes_on() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), uncollected():
        _ = 1 / 0
    assert gc.isenabled()


def test_building_is_independent_of_the_program_s_defaults() -> None:
    base = tiny.build("llama").to(torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = get_peft_model(base, LoraConfig(**CONFIG), autocast_adapter_dtype=False)
            again = get_peft_model(
                tiny.build("llama").to("meta", torch.bfloat16), LoraConfig(**CONFIG)
            )
    finally:
        torch.set_default_dtype(torch.float32)
    own = [p for n, p in model.named_parameters() if ".adapters." in n]
    assert {(p.dtype, p.device.type) for p in own} == {(torch.bfloat16, "cpu")}
    own = [p for n, p in again.named_parameters() if ".adapters." in n]
    assert {(p.dtype, p.device.type) for p in own} == {(torch.float32, "meta")}
    assert gc.isenabled()


# -- a cache


def expected(shelf: Path, name: str) -> Tensor:
    with torch.no_grad():
        return loaded(shelf, name)(IDS).logits


def test_a_cache_loads_on_demand_and_evicts_what_was_used_longest_ago(shelf: Path) -> None:
    base = tiny.build("llama")
    cache = AdapterCache(base, shelf, capacity=2)
    assert cache.names() == list("abcd") and cache.loaded == []
    with torch.no_grad():
        plain = cache.model(IDS).logits
        for name in "abacb":
            with cache.use(name) as model:
                assert torch.equal(model(IDS).logits, expected(shelf, name))
            assert torch.equal(cache.model(IDS).logits, plain)
    assert cache.loaded == ["c", "b"]
    assert (cache.hits, cache.misses, cache.evictions) == (1, 4, 2)
    assert set(cache.model.peft_config) == {"b", "c"}
    text = repr(cache)
    assert "2 of 2 adapters" in text and "1 hits, 4 misses, 2 evictions" in text


def test_a_mixed_batch_out_of_a_cache(shelf: Path) -> None:
    cache = AdapterCache(loaded(shelf, "d"), {n: shelf / n for n in "abc"}, capacity=2)
    model = cache.model
    with torch.no_grad(), cache.rows(["b", "__base__", "a"]) as same:
        assert same is model
        out = model(IDS).logits
    with torch.no_grad(), model.disable_adapter():
        plain = model(IDS).logits
    torch.testing.assert_close(out[0], expected(shelf, "b")[0])
    torch.testing.assert_close(out[1], plain[1])
    torch.testing.assert_close(out[2], expected(shelf, "a")[2])
    assert model.active_adapters == ["d"] and cache.loaded == ["b", "a"]
    with cache.rows(["__base__"] * 3):
        assert cache.loaded == ["b", "a"]
    with pytest.raises(StateError, match="3 adapters are wanted at once and the cache holds 2"):
        cache.rows(["a", "b", "c"]).__enter__()


def test_what_is_in_use_is_not_evicted(shelf: Path) -> None:
    cache = AdapterCache(tiny.build("llama"), lambda name: shelf / name, capacity=2)
    with cache.use("a"), cache.use("b"):
        with pytest.raises(StateError, match=r"no room for 'c': all of .* are in use"):
            cache.load("c")
        with pytest.raises(StateError, match="'a' is in use"):
            cache.evict("a")
    cache.load("c")
    assert cache.loaded == ["b", "c"]
    cache.model.set_adapter("b")  # active in the whole model, so in use
    cache.load("d")
    assert cache.loaded == ["b", "d"]
    cache.clear()
    assert cache.loaded == ["b"]
    with pytest.raises(StateError, match="has not loaded 'x'"):
        cache.evict("x")


def test_a_cache_is_bounded_by_bytes(shelf: Path) -> None:
    one = AdapterCache(tiny.build("llama"), shelf)
    one.load("a")
    size = one.nbytes
    assert size == sum(t.nbytes for t in codec.state(one.model.get_base_model(), "a").values())
    cache = AdapterCache(tiny.build("llama"), shelf, max_bytes=3 * size)
    for name in "abcd":
        cache.load(name)
    assert cache.nbytes <= 3 * size and cache.loaded[-1] == "d" and cache.evictions > 0
    small = AdapterCache(tiny.build("llama"), shelf, max_bytes=size - 1)
    with pytest.raises(StateError, match=f"more than max_bytes={size - 1:,}"):
        small.load("a")
    assert small.loaded == [] and not small.model.peft_config


def test_errors_of_a_cache_say_what_to_do(shelf: Path, tmp_path: Path) -> None:
    cache = AdapterCache(tiny.build("llama"), shelf)
    with pytest.raises(StateError, match=r"no adapter 'e' .* it has \['a', 'b', 'c', 'd'\]"):
        cache.load("e")
    for name in ("../a", "a/../b", str(shelf / "a"), "x/y", ""):
        with pytest.raises(StateError):
            cache.load(name)
    assert cache.loaded == [] and not cache._uses
    with pytest.raises(FileError, match="no folder"):
        AdapterCache(tiny.build("llama"), tmp_path / "none")
    with pytest.raises(ValueError, match="capacity=0 leaves no room"):
        AdapterCache(tiny.build("llama"), shelf, capacity=0)
    with pytest.warns(UserWarning, match="within their block alone"):
        cache.use("a")
        gc.collect()
    block = cache.use("a")
    with block:
        pass
    with pytest.raises(StateError, match="entered before"):
        block.__enter__()


def test_a_file_that_does_not_fit_leaves_the_cache_as_it_was(shelf: Path, tmp_path: Path) -> None:
    get_peft_model(tiny.build("llama"), LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "bad"
    )
    config = tmp_path / "bad" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"r": 2'))
    places = {**{n: shelf / n for n in "ab"}, "bad": tmp_path / "bad"}
    cache = AdapterCache(tiny.build("llama"), places, capacity=3)
    with pytest.raises(FileError), cache.rows(["a", "bad", "b"]):
        pass
    assert not cache._uses and "bad" not in cache.loaded
    with cache.rows(["a", "b", "a"]) as model:
        assert set(model.peft_config) == {"a", "b"}


def test_a_cache_notices_what_the_user_deletes(shelf: Path) -> None:
    cache = AdapterCache(tiny.build("llama"), shelf, capacity=2)
    cache.load("a", "b")
    cache.model.delete_adapter("a")
    assert cache.loaded == ["b"]
    with cache.use("a"):
        assert cache.loaded == ["b", "a"]
    assert cache.misses == 3


@pytest.mark.fault("F8")
def test_threads_share_a_cache(shelf: Path) -> None:
    cache = AdapterCache(tiny.build("llama"), shelf, capacity=2, timeout=60)
    wanted = {name: expected(shelf, name) for name in "abcd"}
    wrong: list[object] = []

    def serve(names: str) -> None:
        try:
            with torch.no_grad():
                for name in names:
                    with cache.use(name) as model:
                        if not torch.equal(model(IDS).logits, wanted[name]):
                            wrong.append(name)
        except BaseException as error:
            wrong.append(error)

    orders = ["abcdab", "dcbadc", "bdacbd", "caabbd"]
    threads = [threading.Thread(target=serve, args=(names,)) for names in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache.loaded) <= 2
    assert cache.hits + cache.misses == sum(map(len, orders))
    assert cache.misses - cache.evictions == len(cache.loaded)
