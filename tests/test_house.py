"""The house itself: what an import loads, the size of its rooms, the counts of a known model."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftwork
from graftwork import AdaLoraConfig, LoraConfig, get_peft_model

SOURCE = Path(graftwork.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
SEVERAL = {  # what brings more than a formula; none over 200
    "adalora.py": 150,  # its schedule
    "lora_config.py": 150,  # the options of all variants
    "arrow.py": 130,  # building a model of saved adapters
}
HEAVY = "torch transformers numpy safetensors huggingface_hub accelerate datasets peft".split()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.fault("F9")
@pytest.mark.parametrize(
    ("statement", "free_of"),
    [
        ("import graftwork", HEAVY),
        ("import graftwork; graftwork.__version__; dir(graftwork)", HEAVY),
        (
            "from graftwork import LoraConfig, get_peft_model",
            [
                *("transformers", "safetensors", "pydantic", "typer", "rich", "huggingface_hub"),
                *("graftwork.model.storage", "graftwork.files", "graftwork.updates"),
            ],
        ),
        ("from graftwork import LoraConfig", ["transformers", "accelerate", "datasets", "peft"]),
        (
            "from graftwork import LoraConfig, get_peft_model, PeftModel, AutoPeftModelForCausalLM",
            ["transformers", "accelerate", "datasets", "peft", "huggingface_hub"],
        ),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, free_of: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {free_of} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_explained() -> None:
    for name in graftwork.__all__:
        value = getattr(graftwork, name)
        assert name == "METHODS" or value.__doc__, name
    assert set(graftwork.__all__) <= set(dir(graftwork))
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        graftwork.LoraConfg  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(SOURCE)) for p in FILES])
def test_rooms_stay_small(path: Path) -> None:
    limit = SEVERAL.get(path.name, 120) if path.parent.name == "methods" else 400
    assert lines(path) <= limit
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 50, f"{node.name} is too long"


def test_a_method_is_a_small_file() -> None:
    methods = [lines(path) for path in (SOURCE / "methods").glob("*.py")]
    assert sorted(methods)[len(methods) // 2] < 90
    rooms = ("methods", "inits", "optim")
    assert sum(lines(path) for room in rooms for path in (SOURCE / room).glob("*.py")) < 6500


def test_the_engine_stays_small_and_knows_nobody() -> None:
    assert sum(map(lines, (SOURCE / "engine").rglob("*.py"))) < 2500
    for path in (SOURCE / "engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                known = (node.module or "").partition(".")[0]
                rooms = ("config", "errors", "fast", "targets")
                assert known in rooms, f"{path.name}: {node.module}"


def test_the_counts_of_llama_2_7b() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(base, LoraConfig(r=16, target_modules=targets))
    assert model.get_nb_trainable_parameters() == (12_582_912, 6_750_998_528)
    assert f"{100 * 12_582_912 / 6_750_998_528:.2f}" == "0.19"
    table = str(model.adapters())
    assert "q_proj x32" in table and "meta" in table
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    model = get_peft_model(base, AdaLoraConfig(init_r=12, total_step=10, target_modules=targets))
    assert model.get_nb_trainable_parameters()[0] == 96 * (12 * 2 * 4096 + 12)
