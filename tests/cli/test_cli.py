"""The command line as a user sees it: output, exit codes, and errors without tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from graftwork.cli.app import build
from graftwork.cli.train import split
from graftwork.table import METHODS
from graftwork.train.recipe import FIELDS, RecipeError
from train import toys


def graft(*words: Any, **options: Any) -> Result:
    os.environ["COLUMNS"] = "80"
    return CliRunner().invoke(build(), [str(word) for word in words], **options)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return toys.write_table(folder / "reviews.tsv", toys.reviews(60), ("sentence", "label"))


@pytest.fixture(scope="session")
def adapter(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "out"
    done = graft("train", "--model", bert, "--data", data, "--output", out, "--steps", 3)
    assert done.exit_code == 0, done.output
    return out


def test_help_is_light_and_complete() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom graftwork.cli.app import build\nfor "
        "words in (['--help'], ['train', '--help'], ['demo', '--help']):\n    done = "
        "CliRunner().invoke(build(), words)\n    assert done.exit_code == 0, done.output\nheavy = "
        "{'torch', 'transformers', 'datasets', 'numpy', 'accelerate'} & set(sys.modules)\nassert "
        "not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_first_help_needs_no_recipe() -> None:
    script = (
        "import sys; sys.argv = ['graft', '--help']; from graftwork.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print({'pydantic', 'yaml', 'torch', 'graftwork.train'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    text, _, loaded = done.stdout.rstrip("\n").rpartition("\n")
    assert loaded == "set()"
    assert text.split() == graft("--help").output.split()  # as where all is loaded


def test_every_field_of_the_recipe_is_in_the_help() -> None:
    text = graft("train", "--help", terminal_width=120).output
    assert all(f"--{name.replace('_', '-')}" in text for name in FIELDS)
    assert "graft train --model" in text and "graft train recipe.yaml" in text


def test_the_version() -> None:
    assert graft("--version").output.startswith("graftwork ")


def test_training_keeps_what_a_step_frees(
    bert: Path, data: Path, tmp_path: Path, kept: list[bool]
) -> None:
    words = ("--model", bert, "--data", data, "--output", tmp_path / "out", "--steps", 2)
    assert graft("train", *words, "--plan").exit_code == 0 and not kept
    assert graft("train", *words).exit_code == 0 and kept == [True]


def test_training_shows_a_plan_and_a_result(bert: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = graft("train", "--model", bert, "--data", data, "--output", out, "--steps", 3, "--r", 2)
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.stdout and f'graft predict {out} "some text"' in done.stdout
    assert "model" not in done.stdout
    for words in ("54 to train, 6 held out (10% of reviews.tsv)", "text = sentence, label",
                  "(r=2)", "an estimate", "step 3/3  loss "):  # fmt: skip
        assert words in done.stderr, done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80


def test_a_yaml_file_and_flags_and_json(bert: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {bert}\ndata: {data}\nsteps: 50\nlora_rank: 4\noutput: {out}\n")
    done = graft("train", recipe, "--steps", "2", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["plan"]["steps"] == 2 and told["output"] == str(out)
    assert told["metric"] == "accuracy" and set(told["after"]) == {"accuracy", "macro_f1", "loss"}
    assert "lora_rank is called r here" in done.stderr and "Traceback" not in done.stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 4


def test_the_plan_alone(bert: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("train", "--model", bert, "--data", data, "--output", out, "--plan")
    assert "parameters" in graft(*words).stderr
    assert json.loads(graft(*words, "--json").stdout)["method"] == "LORA"
    assert list(tmp_path.iterdir()) == []


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing given": ([], "--model is missing: base model"),
    "a typing error": (["--batch-sise", "3"], "is no option; did you mean 'batch-size'"),
    "a rank of 0": (["--model", "m", "--data", "d", "--r", "0"], "r must be at least 1"),
    "no such data": (["--model", "{bert}", "--data", "no.csv"], "there is no data at no.csv"),
    "no such model": (["--model", "./no", "--data", "{data}"], "there is no folder ./no"),
    "no such column": (
        ["--model", "{bert}", "--data", "{data}", "--text-column", "txt"], "no column 'txt'",
    ),
    "no such target": (
        ["--model", "{bert}", "--data", "{data}", "--target-modules", "qery"],
        "target_modules entry 'qery' matches no module",
    ),
    "a missing recipe": (["recipe.yaml"], "there is no recipe file recipe.yaml"),
    "words too many": (["--r", "1", "2"], "'2' belongs to no option"),
    "resuming nothing": (["--resume", "--output", "x"], "no unfinished training"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_leaves_with_2_and_one_screen(
    name: str, bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, text = WRONG[name]
    done = graft("train", *(word.format(bert=bert, data=data) for word in words))
    assert done.exit_code == 2, done.output
    assert text in done.stderr and done.stderr.startswith("error  ")
    assert "Traceback" not in done.output and done.stdout == ""
    assert len(done.stderr.splitlines()) < 40
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_with_1(bert: Path, data: Path, tmp_path: Path) -> None:
    words = (
        "train", "--model", bert, "--data", data, "--output", tmp_path / "out", "--precision",
        "fp32", "--learning-rate", 1e30, "--max-grad-norm", 1e30, "--warmup", 0, "--steps", 20,
    )  # fmt: skip
    done = graft(*words)
    assert done.exit_code == 1 and "the loss became nan at step" in done.stderr
    assert list(tmp_path.iterdir()) == []
    told = json.loads(graft(*words, "--json").stdout)
    assert told["error"]["type"] == "TrainingError"


def test_the_unforeseen_is_short_unless_asked_for(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any) -> None:
        raise RuntimeError("out of memory: you tried to allocate 9 GB")

    monkeypatch.setattr("graftwork.train.use.load", breaks)
    done = graft("predict", adapter, "x")
    assert done.exit_code == 1 and "the memory does not suffice" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("GRAFT_DEBUG", "1")
    assert "Traceback" in graft("predict", adapter, "x").stderr
    monkeypatch.setattr("graftwork.train.use.load", lambda folder: 1 / 0)
    assert "unexpected ZeroDivisionError" in graft("predict", adapter, "x").stderr


def test_eval_predict_and_their_json(adapter: Path) -> None:
    done = graft("eval", adapter)
    assert done.exit_code == 0 and "accuracy" in done.stdout and "6 examples" in done.stdout
    told = json.loads(graft("eval", adapter, "--json").stdout)
    assert set(told["metrics"]) == {"accuracy", "macro_f1", "loss"} and told["count"] == 6
    assert "%" in graft("predict", adapter, "the film was good").stdout
    told = json.loads(graft("predict", adapter, "good", "bad", "--json").stdout)
    assert [row["text"] for row in told] == ["good", "bad"]
    assert sum(told[0]["probabilities"].values()) == pytest.approx(1)
    done = graft("predict", adapter, input="good\n\nbad\n")
    assert [line.partition("\t")[2] for line in done.stdout.splitlines()] == ["good", "bad"]
    assert graft("predict", adapter, input="").exit_code == 2
    assert graft("generate", adapter, "hello").exit_code == 2
    assert "longer than the limit" in graft("predict", adapter, "very " * 50).stderr


def test_generate(tmp_path: Path) -> None:
    base = toys.llama(tmp_path / "base")
    data = toys.write_table(tmp_path / "d.jsonl", toys.answers(20), ("prompt", "completion"))
    out = tmp_path / "out"
    done = graft("train", "--model", base, "--data", data, "--output", out, "--steps", 2)
    assert done.exit_code == 0 and f'graft generate {out} "your prompt"' in done.stdout
    told = json.loads(graft("generate", out, "say good", "--max-new-tokens", 4, "--json").stdout)
    assert set(told) == {"prompt", "text"}
    warm = ("generate", out, "say good", "--temperature", "2", "--seed")
    assert graft(*warm, 1).stdout == graft(*warm, 1).stdout
    assert graft("generate", out, "say " * 100).exit_code == 2


def test_methods() -> None:
    text = graft("methods").stdout
    assert all(name in text for name in METHODS)
    assert {row["name"] for row in json.loads(graft("methods", "--json").stdout)} == set(METHODS)
    assert "--lora-alpha" in graft("methods", "lora").stdout
    told = json.loads(graft("methods", "LORA", "--json").stdout)
    option = {"name": "r", "type": "int", "default": 8, "meaning": "rank"}
    assert option in told["options"]
    assert graft("methods", "lorra").exit_code == 2


def test_the_options_of_a_method_are_explained() -> None:
    for name in METHODS:
        told = json.loads(graft("methods", name, "--json").stdout)
        assert not [row["name"] for row in told["options"] if not row["meaning"]], name
    shown = graft("methods", "bottleneck").stdout
    assert max(map(len, shown.splitlines())) <= 80  # the width of graft() in these tests
    assert "behind attention and feed-forward" in " ".join(shown.split())
    assert shown.index("--kind") < shown.index("of every method") < shown.index("--bias")


def test_the_matrix_fits_a_terminal() -> None:
    shown = graft("methods", "--matrix").stdout
    assert max(map(len, shown.splitlines())) <= 100
    data = json.loads(graft("methods", "--matrix", "--json").stdout)
    lines = shown.splitlines()
    for name, cells in data["ours"].items():
        i = next(i for i, line in enumerate(lines) if f"{line} ".startswith(f"{name} "))
        row = lines[i + 1] if lines[i] == name else lines[i]  # a long name has a line to itself
        signs = {"yes": "+", "impossible": "x", "-": " "}
        at = [row.ljust(100)[18 + 3 * i] for i in range(len(cells))]
        assert at == [signs[cell.partition(":")[0]] for cell in cells.values()], name
    assert all(f"\n{METHODS[name].family}\n" in shown for name in data["ours"] if name in METHODS)
    assert "0 no. In PEFT" in " ".join(shown.split())


def test_the_matrix_of_one_method() -> None:
    shown = graft("methods", "poly", "--matrix").stdout
    assert "Impossible, since its update differs from row to row" in " ".join(shown.split())
    assert "since its mixture depends on the input" in graft("methods", "xlora", "--matrix").stdout
    told = json.loads(graft("methods", "LORA", "--matrix", "--json").stdout)
    assert set(told) == {"ours", "peft"} and told["ours"]["merge"] == "yes"


def test_words_are_split_into_options() -> None:
    words = ["a.yaml", "--r", "8", "--use-dora", "--bias=all", "--x", "-1"]
    assert split(words) == ("a.yaml", {"r": "8", "use_dora": True, "bias": "all", "x": "-1"})
    with pytest.raises(RecipeError, match="'b' belongs to no option"):
        split(["--r", "8", "b"])


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_gives_the_same_bits(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "graftwork", "train"]
    common = [
        "--model", bert, "--data", data, "--steps", 400, "--batch-size", 8, "--lora-dropout", 0.1,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(*more: Any) -> list[str]:
        return [str(word) for word in (*words, *more)]

    subprocess.run(command(*common, "--output", tmp_path / "a"), check=True, env=env)
    with subprocess.Popen(
        command(*common, "--output", tmp_path / "b"), stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 1 and "stopping after this step" in rest, rest
    assert "python -m graftwork train --resume --output" in rest and "Traceback" not in rest
    assert not (tmp_path / "b").exists()
    subprocess.run(command("--resume", "--output", tmp_path / "b"), check=True, env=env)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
