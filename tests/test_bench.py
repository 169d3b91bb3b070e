"""The benchmarks: rows, tables and pages are formed right, counts count; no time decides a test."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import report
import run
import step
import steps

ROOT = Path(__file__).parents[1]
TINY = step.Shape(32, 2, 48, 64, 4, 2, 8)
ROW = {"name": "a", "peft": 2.0, "ours": 1.0, "unit": "ratio", "bound": 1.1}
RESULT = {
    "machine": {"cpu": "A CPU", "threads": 2},
    "measured": {"many": {"date": "2026-01-02", "commit": "abc", "versions": {"torch": "2"}}},
    "rows": [ROW | {"module": "many"}],
}


def test_rows_are_well_formed() -> None:
    unknown = ROW | {"ours": None, "note": "no unit"}
    assert report.checked([ROW, unknown], "many") == [
        r | {"module": "many"} for r in (ROW, unknown)
    ]
    (unbound,) = report.checked([ROW | {"bound": float("inf")}], "many")
    assert unbound["bound"] is None and ROW["bound"] == 1.1


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({k: v for k, v in ROW.items() if k != "bound"}, "has no 'bound'"),
        (ROW | {"ours": "1.0"}, "ours='1.0' in 'a'"),
        (ROW | {"ours": True}, "ours=True in 'a'"),
        (ROW | {"ours": float("nan")}, "'a' has a value that is not finite"),
        (ROW | {"ours": None}, "'a' was not measured; say why in note"),
        (ROW | {"bund": 1.0}, r"'a' has unknown \['bund'\]"),
        (None, "gave no row"),
    ],
)
def test_a_malformed_row_is_refused(row: dict[str, Any] | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        report.checked([] if row is None else [row], "many")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "yes"),
        ({"ours": 1.1}, "yes"),
        ({"ours": 1.2}, "NO"),
        ({"ours": 1.2, "at_least": True}, "yes"),
        ({"ours": 1.0, "at_least": True}, "NO"),
        ({"bound": None}, "-"),
        ({"ours": None, "note": "why"}, "not measured"),
    ],
)
def test_the_verdict(change: dict[str, Any], said: str) -> None:
    assert report.verdict(ROW | change) == said


def test_the_table() -> None:
    rows = [
        ROW,
        {"name": "set_adapter", "peft": 114.2, "ours": 0.0213, "unit": "ms", "bound": 1.0},
        ROW | {"name": "faster", "peft": None, "bound": 3, "at_least": True},
        ROW | {"name": "losses", "peft": 1.53e-7, "bound": 1e-5, "unit": "relative difference"},
        ROW | {"name": "recompilations", "peft": 31, "ours": 0, "bound": 0, "unit": "count"},
    ]
    assert report.table(rows) == (
        "| row            |    PEFT |      ours |       at most | met |\n"
        "|----------------|--------:|----------:|--------------:|----:|\n"
        "| a              |    2.00 |      1.00 |          1.10 | yes |\n"
        "| set_adapter    |  114 ms | 0.0213 ms |          1 ms | yes |\n"
        "| faster         |       - |      1.00 | at least 3.00 |  NO |\n"
        "| losses         | 1.5e-07 |         1 |       1.0e-05 |  NO |\n"
        "| recompilations |      31 |         0 |             0 | yes |"
    )


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "a.json"
    run.write(RESULT, path)
    back = json.loads(path.read_text())
    assert back == RESULT and report.digest(back["rows"]) == report.digest(RESULT["rows"])
    assert report.digest([ROW]) != report.digest([ROW | {"ours": 1.01}])


def test_a_run_of_some_modules_keeps_the_rows_of_others(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    fresh = {
        "machine": {"cpu": "A CPU"},
        "measured": {"steps": {"date": "2026-01-03"}},
        "rows": [ROW | {"module": "steps"}],
    }
    assert run.merged(fresh, path) == fresh
    run.write(RESULT, path)
    both = run.merged(fresh, path)
    assert [r["module"] for r in both["rows"]] == ["steps", "many"]  # in the order of MODULES
    assert both["measured"] == RESULT["measured"] | fresh["measured"]
    run.write(both, path)
    assert run.merged(fresh, path) == both  # again: nothing twice


def test_what_cannot_run_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "MODULES", {"absent": "nothing", "elsewhere": "no module there"})
    (tmp_path / "elsewhere.py").touch()
    rows, wrong = run.collect(["absent", "elsewhere"], True, "cpu", 1)
    assert rows == []
    assert wrong == [
        "absent: benchmarks/absent.py is missing (nothing)",
        "elsewhere: ended with status 1, see above",
    ]
    assert "No module named 'elsewhere'" in capfd.readouterr().err


def test_a_module_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[bool] = []

    def rows(quick: bool = False) -> list[dict[str, Any]]:
        given.append(quick)
        return [ROW]

    monkeypatch.setitem(sys.modules, "many", SimpleNamespace(rows=rows))
    monkeypatch.setattr(step.transformers.logging, "set_verbosity_error", lambda: None)
    run.child("many", tmp_path / "out", True, "cpu", torch.get_num_threads())
    assert json.loads((tmp_path / "out").read_text()) == RESULT["rows"] and given == [True]


def test_what_is_promised_and_not_there_is_named() -> None:
    names = ["forward, 16 rows, 16 adapters, 64 tokens", "decode, 64 rows, 64 adapters of ranks"]
    assert run.lacking("mixed", [ROW | {"name": name} for name in names]) == ["recompilations"]
    assert run.lacking("less", []) == []
    of = [row for at in steps.FLOORS for row in steps.of_a_shape(None, *at)]
    assert run.lacking("steps", of) == []
    assert set(run.PROMISED) <= set(run.MODULES)


def test_speed_ups_are_the_better_the_larger() -> None:
    rows = report.checked([ROW | {"ours": 3.5, "bound": 3.0}, ROW | {"bound": None}], "together")
    assert [report.verdict(row) for row in rows] == ["yes", "-"]
    assert report.times_the_bound(rows[0], "ours") == 3.0 / 3.5


def test_what_measures_cpus_does_not_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--only", "many", "steps"])
    with pytest.raises(SystemExit, match="many: these measure CPUs only; leave out --device cuda"):
        run.main()


def test_the_machine_and_the_versions_are_named() -> None:
    assert run.machine("cpu", 2)["cpu"] and run.machine("cpu", 2)["threads"] == 2
    assert run.versions()["torch"] == torch.__version__
    assert run.commit()


# the page


@pytest.fixture
def performance() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "performance.py"))


def test_the_page_is_of_the_results(performance: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert performance["page"](text) == text, "run: python docs/performance.py"
    shown = {path.stem for path in (ROOT / "docs" / "performance").glob("*")}
    assert shown == {path.stem for path in run.RESULTS.glob("*.json")}


def test_committed_results_are_well_formed() -> None:
    for path in run.RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            report.checked([row], row["module"])
            assert row["module"] in result["measured"], path.name


def test_a_section_shows_its_data(
    performance: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = performance["section"].__globals__
    monkeypatch.setitem(names, "PLOTS", tmp_path)
    data, plot = tmp_path / "mine.json", tmp_path / "mine.svg"
    run.write(RESULT, data)
    with pytest.raises(SystemExit, match=r"mine\.svg does not show mine\.json; run: python"):
        performance["section"](data)
    plot.write_text(report.digest([ROW]), encoding="utf-8")  # of other rows
    with pytest.raises(SystemExit, match="does not show"):
        performance["section"](data)
    plot.write_text(report.digest(RESULT["rows"]), encoding="utf-8")
    text = performance["section"](data)
    assert report.table(RESULT["rows"]) in text and "### A CPU (`mine`)" in text
    assert "measured 2026-01-02 at commit abc with torch 2" in text
    assert "not run there: steps, losses" in text and "(performance/mine.svg)" in text
    with pytest.raises(SystemExit, match="<!-- results --> or <!-- end --> is missing"):
        performance["page"]("# Performance\n")


# the step


def test_a_tiny_step_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    sizes = "--width 32 --layers 2 --mlp 48 --heads 4 --vocabulary 64 --rows 2 --length 8"
    rest = f"--dtype float32 --rounds 1 --threads {torch.get_num_threads()}"
    out = tmp_path / "times.json"
    monkeypatch.setattr(step.transformers.logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(sys, "argv", ["step.py", *sizes.split(), *rest.split(), "--json", str(out)])
    step.main()
    (found,) = json.loads(out.read_text())
    assert set(found["seconds"]) == set(step.USUAL)
    assert all(len(times) == 1 and times[0] > 0 for times in found["seconds"].values())
    assert set(found["saved"]) == set(step.SAVING)
    assert found["saved"]["floor"] < found["saved"]["full"]
    text = capsys.readouterr().out
    assert "width 32, 2 layers, MLP 48, 2 x 8 tokens, float32, cpu" in text
    assert "ours+adamw / full+adamw" in text and "WARNING" not in text


def test_the_rows_of_a_shape() -> None:
    times = {name: [float(i)] * 2 for i, name in enumerate(step.VARIANTS, 1)}
    result = step.Result(TINY, times, {name: i for i, name in enumerate(step.SAVING, 1)})
    rows = {r["name"]: r for r in steps.of_a_shape(result, 512, "bfloat16")}
    rows |= {r["name"]: r for r in steps.of_a_shape(result, 1024, "bfloat16")}
    report.checked(rows.values(), "steps")
    at = {name: times[name][0] for name in times}
    dropped = rows["step / floor, width 512, bf16, dropout 0.05"]
    assert dropped["peft"] == at["peft-dropout"] / at["floor"] and dropped["bound"] == 1.35
    tuned = rows["LoRA step / full fine-tuning step, width 1024, bf16, with AdamW"]
    assert tuned["ours"] == at["ours+adamw"] / at["full+adamw"] and tuned["bound"] == 0.65
    dora = rows["DoRA step / LoRA step, width 1024, bf16"]
    assert dora["peft"] == at["peft-dora"] / at["peft"]
    assert dora["ours"] == at["ours-dora"] / at["ours"]
    saved = rows["bytes saved for backward / floor's, width 512, bf16, dropout 0"]
    assert saved["ours"] == result.saved_ratio("ours") and saved["bound"] == 1.25
    empty = steps.of_a_shape(None, 512, "bfloat16")
    assert [r["name"] for r in empty] == [n for n in rows if "width 512" in n]
    assert {report.verdict(r) for r in report.checked(empty, "steps")} == {"not measured"}


def test_rounds_rotate() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = step.interleaved(runs, rounds=3, warm=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert step.ratio({"a": [2, 9, 4], "b": [1, 3, 1]}, "a", "b") == 3
    assert step.ratio({"a": [1.0]}, "a", "b") is None


class Hoards(torch.autograd.Function):
    """Saves one tensor in autograd's way, and keeps the same and another beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.same, ctx.other = x[:1], torch.empty(1000, dtype=torch.uint8)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def test_saved_bytes_are_counted_once_wherever_they_are() -> None:
    class Runner(step.Runner):
        def loss(self) -> Tensor:
            hidden = self.model(self.ids) + 1  # (4, 8) in fp32: 128 bytes, saved by the next
            return Hoards.apply(hidden).sum()

    linear = nn.Linear(16, 8)  # saves its input, which is there before
    runner = Runner(linear, torch.randn(4, 16), leaves=list(linear.parameters()))
    assert step.saved_bytes(runner) == 4 * 8 * 4 + 1000 + 4 * 16 * 4


def test_variants_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"no \['our'\]; there are floor, full"):
        step.possible(["our"])
    monkeypatch.setattr(step, "has_peft", lambda: False)
    assert step.possible(["floor", "peft", "ours", "peft+adamw"]) == ["floor", "ours"]
    assert "peft is not installed: its variants are left out" in capsys.readouterr().out


def test_a_cpu_without_a_unit_for_bf16_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [step.shape(512, "bfloat16"), step.shape(512, "float32")]
    monkeypatch.setattr(step, "bf16_units", lambda: ["AMX"])
    step.warn_of_bf16(shapes)
    monkeypatch.setattr(step, "bf16_units", lambda: [])
    step.warn_of_bf16(shapes[1:])
    step.warn_of_bf16([step.shape(2048, "bfloat16", "cuda")])
    assert capsys.readouterr().out == ""
    step.warn_of_bf16(shapes)
    assert "no unit for bf16" in capsys.readouterr().out


def test_shapes_are_those_of_the_page() -> None:
    assert str(step.shape(512, "float32")).startswith("width 512, 8 layers, MLP 1376, 8 x 128")
    assert str(step.shape(1024, "bfloat16")).startswith("width 1024, 4 layers, MLP 2752, 8 x 128")
