"""A merge is counted and probed: what would not do what the adapters do is not done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import graftwork as g
from graftwork import Adapter, LoraConfig, MergeError, PeftModel, TargetConfig, get_peft_model
from graftwork.engine.host import Host, LayerHost
from graftwork.files.mapped import layout
from graftwork.merging import merge as room
from graftwork.merging.merge import NOTE, merge_files
from graftwork.merging.plan import Plan
from graftwork.testing.bench import shake
from specs import ROWS
from tiny import IDS, MODELS, build, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adapted(config: Any = None, name: str = "llama") -> Any:
    config = config or LoraConfig(r=2, target_modules=["q_proj", "v_proj", "embed_tokens"])
    model = get_peft_model(build(name), config).eval()
    shake(model)
    return model


def weights(model: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def untouched(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not model.base_model.merged() and not model.base_model.switch.merged


@pytest.mark.fault("D1")
@pytest.mark.fault("D3")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_every_method_is_within_the_bound_of_its_dtype(row: str, dtype: torch.dtype) -> None:
    model = ROWS[row].small().to(dtype)
    if any(
        "merge" in p.FORBIDS for h in model.base_model.hosts().values() for p in h.parts(("a0",))
    ):
        with pytest.raises(MergeError):
            model.merge_adapter()
        assert model.merge_report is None
        return
    model.merge_adapter()
    report = model.merge_report
    assert report.sites == list(model.base_model.hosts()) and report.adapters == ["a0"]
    assert 0 <= report.difference < 0.5
    assert f"a0: {len(report.sites)} layers merged, {report.probed} probed; their" in str(report)
    kinds = [(h, h.parts(("a0",))) for h in model.base_model.hosts().values()]
    tried = [isinstance(h, LayerHost) and not any(p.replaces for p in own) for h, own in kinds]
    assert report.probed == sum(tried)


def test_which_layers_are_probed() -> None:
    model = adapted()
    model.merge_adapter(["default"], keep="cpu")
    assert len(model.merge_report.sites) == model.merge_report.probed == 5
    model = adapted(
        LoraConfig(r=2, target_modules=["dense"], modules_to_save=["classifier"]), "bert"
    )
    assert model.merge_and_unload() is not None
    report = model.merge_report
    assert [p for p, ratio in report.ratios.items() if ratio is None] == ["classifier"]
    assert report.worst in report.sites and report.outputs is None


@dataclass
class WrongConfig(TargetConfig, method="WRONG"):
    """A method whose two answers do not agree."""


class Wrong(Adapter, config=WrongConfig):
    """W' = W + D, and three quarters of that where it runs."""

    keys = {"d": "wrong_d"}

    def __init__(self, config: Any, site: Any) -> None:
        super().__init__(config, site)
        self.d = nn.Parameter(torch.empty(site.shape))

    def start(self, site: Any) -> None:
        self.d.zero_()

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self.d, b

    def forward(self, x: Tensor, layer: Any) -> Tensor:
        return layer(x) + layer.site.apply(x, 0.75 * self.d)


@pytest.mark.fault("D4")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_does_something_else_is_not_written(dtype: torch.dtype) -> None:
    model = adapted(WrongConfig(target_modules=["q_proj"]))
    model.get_base_model().to(dtype)
    before = weights(model)
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(keep=False),
        model.merge_and_unload,
        model.base_model.merge_adapter,
    ):
        with pytest.raises(
            MergeError, match=r"would change what it computes: its outputs would be"
        ):
            merge()
        untouched(model, before)


def left_out(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Leave one layer out of every merge."""
    path = "model.layers.1.self_attn.v_proj"
    names: dict[str, tuple[Any, Callable[..., Any]]] = {
        "prepare": (Host, lambda *_: {}),
        "folded": (LayerHost, lambda *_: iter(())),
        "commit": (Host, lambda *_: None),
    }
    owner, nothing = names[how]
    plain = getattr(owner, how)

    def instead(self: Any, *args: Any) -> Any:
        return nothing(self, *args) if self.path == path else plain(self, *args)

    monkeypatch.setattr(owner, how, instead)


@pytest.mark.fault("D6")
@pytest.mark.parametrize("how", ["prepare", "folded", "commit"])
def test_a_layer_that_is_left_out_is_an_error(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before, want = weights(model), run(model, "llama")
    with monkeypatch.context() as patch:
        left_out(patch, how)
        text = (
            r"leave model.layers.1.self_attn.v_proj as it is|left out 1 of 5 layers, model.layers.1"
        )
        with pytest.raises(MergeError, match=text):
            model.merge_adapter()
        untouched(model, before)
        with pytest.raises(MergeError, match=text):
            model.merge_and_unload()
    assert torch.equal(run(adapted(), "llama"), want)


@pytest.mark.fault("D6")
@pytest.mark.parametrize("keep", [True, "cpu", False])
def test_a_batch_is_compared_before_and_after(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    want, batch = run(model, "llama"), MODELS["llama"][1]
    model.merge_adapter(keep=keep, probe=batch)
    assert 0 <= model.merge_report.outputs < 1e-4
    assert "outputs differ by" in str(model.merge_report)
    torch.testing.assert_close(run(model, "llama"), want, rtol=1e-4, atol=1e-5)
    if keep is False:
        with pytest.raises(g.StateError, match="keep=False"), model.disable_adapter():
            run(model, "llama")
    else:
        model.unmerge_adapter()
        assert torch.equal(run(model, "llama"), want)
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    before = weights(model)
    plain = Host.commit

    def half(self: Any, names: Any, new: Any, keep: Any) -> None:
        for value in new.values():
            value.mul_(0.5)
        plain(self, names, new, keep)

    with monkeypatch.context() as patch:
        patch.setattr(Host, "commit", half)
        with pytest.raises(MergeError, match=r"would change what the model computes: outputs for"):
            model.merge_adapter(keep=keep, probe=IDS)
    untouched(model, before)
    assert model.merge_and_unload(probe=(IDS,)) is not None


CYCLED = ["LORA", "DoRA", "IA3", "OFT", "HIRA", "FOURIERFT"]


@pytest.mark.fault("D3")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", CYCLED)
def test_a_thousand_merges_of_any_method_leave_every_bit(row: str, dtype: torch.dtype) -> None:
    model = ROWS[row].small().to(dtype)
    before, root = weights(model), model.base_model
    first = next(iter(root.hosts().values()))
    prepared = [(host, host.prepare(("a0",))) for host in root.hosts().values()]
    for i in range(1000):  # what each computes is the same: the first and the last are whole
        if i in (0, 999):
            model.merge_adapter()
        else:
            for host, new in prepared:
                host.commit(("a0",), new, True)
            root.switch.merged = ("a0",)
        assert first.originals
        model.unmerge_adapter()
    untouched(model, before)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A base model in several files, and an adapter."""
    base: Any = build("llama")
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def merged(files: tuple[Path, Path], out: Path) -> Any:
    from transformers import AutoConfig

    base, adapter = files
    return merge_files(base, adapter, out, AutoModelForCausalLM, AutoConfig.from_pretrained(base))


@pytest.mark.fault("D6")
def test_files_are_probed_counted_and_read_back(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    found = merged(files, out)
    assert found.report.probed == len(found.report.sites) == 4 and found.report.difference < 0.5
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files[0]), files[1])
    loaded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(run(loaded, "llama"), run(adapted, "llama"), rtol=1e-4, atol=1e-5)

    plain = Plan.value

    def base_instead(self: Any, name: str) -> Tensor:  # as if one layer had been forgotten
        value: Tensor = self.values[name] if "layers.1.self_attn.v" in name else plain(self, name)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "value", base_instead)
        with pytest.raises(MergeError, match=r"left out 1 of 4 layers, model.layers.1.self_attn.v"):
            merged(files, tmp_path / "lost")
    write = room.write

    def damaged(path: Path, *rest: Any) -> None:
        write(path, *rest)
        for name, one in layout(path).entries.items():
            if "v_proj" in name:
                with open(path, "r+b") as file:
                    file.seek(one.begin)
                    file.write(b"damaged!")

    with monkeypatch.context() as patch:
        patch.setattr(room, "write", damaged)
        with pytest.raises(
            g.FileError, match=r"does not hold the merged values of .*v_proj.weight"
        ):
            merged(files, tmp_path / "lost")
    assert not (tmp_path / "lost").exists() and not (tmp_path / "lost.partial").exists()


def test_a_merge_that_goes_on_remembers_its_probes(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = room._merge, []

    def stops(plan: Any, shard: Any, *rest: Any) -> None:
        calls.append(shard)
        if len(calls) == 3:
            raise KeyboardInterrupt
        plain(plan, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(room, "_merge", stops)
        with pytest.raises(KeyboardInterrupt):
            merged(files, tmp_path / "out")
    noted = json.loads((tmp_path / "out.partial" / NOTE).read_text())["probed"]
    assert 0 < len(noted) < 4
    found = merged(files, tmp_path / "out")
    assert found.resumed == 2 and len(found.report.sites) == 4
    assert {path: found.report.ratios[path] for path in noted} == noted
