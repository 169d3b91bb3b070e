"""``graft inspect``: any adapter's folder, without the base model; and what prompts are near to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from graftwork import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    nearest_tokens,
)
from graftwork.cli.app import build
from train import toys

TASK = "CAUSAL_LM"
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    "ia3": IA3Config(task_type=TASK),
    "vera": VeraConfig(r=8, target_modules=["q_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type=TASK),
    "tasks": MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2, task_type=TASK),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type=TASK),
    "gated": AdaptionPromptConfig(adapter_len=3, task_type=TASK),
}


def graft(*words: Any, columns: int = 80) -> Result:
    os.environ["COLUMNS"] = str(columns)
    return CliRunner().invoke(build(), [str(word) for word in words])


def lines(done: Result) -> list[str]:
    assert done.exit_code == 0, done.output
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each config."""
    folder = tmp_path_factory.mktemp("made")
    for name, config in CONFIGS.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(llama)
        torch.manual_seed(1)
        get_peft_model(base, config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a base model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", loaded)


@pytest.mark.usefixtures("no_model")
def test_layers_are_shown_by_their_places(made: Path, llama: Path) -> None:
    shown = lines(graft("inspect", made / "lora"))
    for line in (
        "method LORA: low-rank update; also DoRA, rsLoRA, PiSSA, ...",
        f"base {llama} (LlamaForCausalLM)",
        "options modules_to_save=[lm_head], r=4, target_modules=[down_proj, q_proj]",
        "2 x model.layers.*.mlp.down_proj lora_A.weight 4 x 48",
        "lora_B.weight 32 x 4",
        "2 x model.layers.*.self_attn.q_proj lora_A.weight 4 x 32",
        "trained as a whole tensors",
    ):
        assert line in shown, line
    size = (made / "lora" / "adapter_model.safetensors").stat().st_size
    told = json.loads(graft("inspect", made / "lora", "--json").stdout)
    assert told["bytes"] == size and told["parameters"] == 2 * 4 * (48 + 32 + 64) + 38 * 32
    assert told["options"]["r"] == 4 and told["nearest"] is None and told["training"] is None
    counts = {row["pattern"]: (row["count"], row["whole"]) for row in told["places"]}
    assert counts["lm_head"] == (1, True)
    assert counts["model.layers.*.mlp.down_proj"] == (2, False)


@pytest.mark.usefixtures("no_model")
def test_what_stands_at_the_root_is_the_whole_models(made: Path) -> None:
    assert "2 x model.layers.*.self_attn.k_proj ia3_l 16 x 1" in lines(
        graft("inspect", made / "ia3")
    )
    shown = lines(graft("inspect", made / "vera"))
    assert "1 x the whole model vera_A 8 x 32" in shown and "vera_B 32 x 8" in shown


@pytest.mark.usefixtures("no_model")
def test_keys_values_and_gates_have_norms(made: Path) -> None:
    assert "layer keys values" in lines(graft("inspect", made / "prefix"))
    told = json.loads(graft("inspect", made / "prefix", "--json").stdout)
    assert [set(row) for row in told["norms"]] == [{"layer", "keys", "values"}] * 2
    shown = lines(graft("inspect", made / "gated"))
    assert any(line.startswith("model.layers.1.self_attn ") for line in shown)


@pytest.mark.parametrize("name", ["prompt", "tasks"])
def test_the_nearest_tokens_need_the_table_alone(
    name: str, made: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(base, made / name)
    wanted = nearest_tokens(model, tokenizer=toys.tokenizer("llama"), k=2)
    request.getfixturevalue("no_model")
    told = json.loads(graft("inspect", made / name, "--nearest", 2, "--json").stdout)
    assert told["vocabulary_norm"] == pytest.approx(wanted.vocabulary_norm)
    for row, one in zip(told["nearest"], wanted, strict=True):
        assert (row["task"], row["place"]) == (one.task, one.place)
        assert [(n["id"], n["text"]) for n in row["nearest"]] == [
            (n.id, n.text) for n in one.nearest
        ]
    shown = graft("inspect", made / name).stdout
    assert repr(wanted[0].nearest[0].text) in shown and "median norm of the vocabulary" in shown
    assert "nearest" not in graft("inspect", made / name, "--nearest", 0).stdout


def test_it_fits_its_terminal_and_a_pipe_gets_a_row_a_line(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CONFIGS:
        for columns in (60, 80, 120):
            text = graft("inspect", made / name, columns=columns).stdout.splitlines()
            assert max(map(len, text)) <= columns, name
            assert not any(line.endswith(" ") for line in text)
    monkeypatch.delenv("COLUMNS")
    done = CliRunner().invoke(build(), ["inspect", str(made / "tasks"), "--nearest", "20"])
    rows = [line for line in done.stdout.splitlines() if line.startswith("task ") and "'" in line]
    assert len(rows) == 4 and all(line.count("'") >= 40 for line in rows)
    assert "\x1b" not in done.stdout


def test_a_large_model_is_read_from_the_part_that_holds_the_table(
    made: Path, llama: Path, tmp_path: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "parts", max_shard_size="4kB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    table = base.get_input_embeddings().weight
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        if file != index["weight_map"]["model.embed_tokens.weight"]:
            (tmp_path / "parts" / file).unlink()
    done = graft("inspect", made / "prompt", "--model", tmp_path / "parts", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["vocabulary_norm"] == pytest.approx(table.float().norm(dim=1).median().item())
    assert told["nearest"][0]["nearest"][0]["text"] is None  # no tokenizer was saved with it
    assert "tokens are shown by their numbers" in done.stderr


@pytest.mark.fault("K5")
def test_without_the_base_model_everything_else_is_shown(
    made: Path, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(made / "prompt", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, text in (
        ("/no/where", "there is no folder /no/where"),
        ("nobody/nothing", "the hub does not give a model of that name"),
        (None, "the adapter does not name it"),
    ):
        config["base_model_name_or_path"] = name
        (folder / "adapter_config.json").write_text(json.dumps(config))
        done = graft("inspect", folder)
        assert done.exit_code == 0 and "prompt_embeddings 3 x 32" in done.stdout
        assert done.stderr.startswith("note ") and text in done.stderr and "--model" in done.stderr
        assert "median" not in done.stdout
    assert "median" in graft("inspect", folder, "--model", llama).stdout
    assert graft("inspect", folder, "--nearest", 0).stderr == ""


def test_a_folder_of_graft_train_tells_of_its_training(tmp_path: Path) -> None:
    bert, data = toys.bert(tmp_path / "bert"), tmp_path / "reviews.csv"
    toys.write_table(data, toys.reviews(40), ("text", "label"))
    out = tmp_path / "out"
    words = ("--method", "PROMPT_TUNING", "--num-virtual-tokens", 2, "--steps", 2, "--output", out)
    done = graft("train", "--model", bert, "--data", data, *words)
    assert done.exit_code == 0, done.output
    shown = lines(graft("inspect", out))
    assert "task type SEQ_CLS" in shown and "1 x classifier bias 2" in shown
    training = " ".join(shown).partition("training ")[2]
    assert training.startswith(
        "classification, 2 labels, 2 steps on reviews.csv; held-out accuracy"
    )
    told = json.loads(graft("inspect", out, "--json").stdout)
    assert told["training"]["task"] == "classification" and told["parameters"] == 2 * 32 + 66
    shutil.rmtree(bert)  # the tokenizer is in the folder, the table is not
    assert "not shown" in graft("inspect", out).stderr


@pytest.mark.fault("K5")
@pytest.mark.filterwarnings("ignore")  # of PEFT's code
def test_a_folder_of_peft_is_read(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2, use_dora=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    shown = lines(graft("inspect", tmp_path))
    assert f"base {llama}" in shown  # PEFT does not note the class
    assert "2 x model.layers.*.self_attn.q_proj lora_A.weight 2 x 32" in shown
    assert "1 x model.embed_tokens weight 38 x 32" in shown and "lora_embedding_A 2 x 38" in shown


def test_what_is_wrong_is_said(made: Path, llama: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(made / "lora", tmp_path / name))

    weights = "adapter_model.safetensors"
    (copied("cut") / weights).write_bytes((made / "lora" / weights).read_bytes()[:200])
    (copied("hollow") / weights).unlink()
    pickled = copied("pickled")
    (pickled / weights).rename(pickled / "adapter_model.bin")
    (copied("torn") / "adapter_config.json").write_text("{")
    other = copied("other")
    shutil.copy(made / "prefix" / "adapter_config.json", other)
    many = tmp_path / "many"
    shutil.copytree(made / "lora", many / "first")
    wrong = {
        made / "lorra": (2, "did you mean 'lora'"),
        "lorra": (2, "there is no folder lorra"),
        llama: (2, "is a base model's folder: adapter_config.json is missing"),
        many: (2, "its folders do: first; give one of them, such as"),
        tmp_path / "cut": (1, "is damaged or no safetensors file"),
        tmp_path / "hollow": (1, "so the adapter is not whole"),
        pickled: (1, "a pickle, which can carry code and is not opened"),
        tmp_path / "torn": (1, "is no JSON"),
        other: (1, "holds no prompt_embeddings, which every PREFIX_TUNING adapter has"),
    }
    for folder, (code, text) in wrong.items():
        done = graft("inspect", folder)
        assert done.exit_code == code and text in done.stderr, (folder, done.output)
        assert done.stdout == "" and "Traceback" not in done.stderr


def test_options_that_have_no_effect_are_refused(made: Path, llama: Path, tmp_path: Path) -> None:
    bert = toys.bert(tmp_path / "narrow", hidden_size=16)
    for words, code, text in (
        ((made / "lora", "--nearest", 3), 2, "--nearest is for virtual tokens that are embeddings"),
        ((made / "prefix", "--model", llama), 2, "--model is for virtual tokens"),
        ((made / "prompt", "--model", "./no"), 2, "--model: there is no folder ./no"),
        ((made / "prompt", "--model", made / "lora"), 2, "is an adapter, not a base model"),
        ((made / "prompt", "--model", bert), 1, "have 32 numbers, and the vocabulary's"),
    ):
        done = graft("inspect", *words)
        assert done.exit_code == code and text in done.stderr, done.output
