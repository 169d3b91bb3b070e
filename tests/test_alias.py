"""Standing in for peft: the alias, native adapters of transformers, unmodified programs."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.dependency_versions_table import deps

import graftwork
from graftwork import IA3Config, LoraConfig, get_peft_model
from graftwork.interop import helpers, shims
from graftwork.interop.classes import layer_class
from graftwork.interop.facts import LAYER_NAMES
from graftwork.interop.names import INSTALLED, MODULES, NAMES
from graftwork.testing.bench import shake
from test_trainer import HERE, run_program, without_peft  # noqa: F401 - a fixture
from tiny import IDS, build, run

IMPLEMENTATIONS = [True, False] if importlib.util.find_spec("peft") else [False]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


@pytest.mark.fault("I5")
@pytest.mark.slow
@pytest.mark.parametrize("installed", IMPLEMENTATIONS)
@pytest.mark.parametrize("first", ["graftwork", "transformers"])
def test_the_alias_is_peft_for_transformers_and_accelerate(
    first: str, installed: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    site = None if installed else request.getfixturevalue("without_peft")
    report = run_program("alias_program.py", first, str(tmp_path), site=site)
    least = deps["peft"].rpartition(">=")[2]
    assert report["version"] == max("0.21.2", least), "transformers refuses an older one"
    assert report["module_version"] == report["version"]
    for fact in ("spec", "same", "is_lora", "available", "accelerate"):
        assert report[fact], fact
    for name, (effect, native, wrapped, off, keys) in report["native"].items():
        assert effect > 1e-3 and max(native, wrapped, off) < 1e-5 and keys == [], name
    assert "did you mean 'v_proj'" in report["lenient"][0]
    assert "It has no effect" in report["lenient"][0]
    assert "graftwork" in report["absent_module"] and "NextRelease" in report["absent"]


@pytest.mark.slow
@pytest.mark.parametrize("installed", IMPLEMENTATIONS)
def test_the_quickstart_runs_unchanged_as_peft(
    installed: bool, base_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    site = None if installed else request.getfixturevalue("without_peft")
    program = [str(HERE / "quickstart.py"), str(base_folder), str(tmp_path / "lora_model")]
    result = run_module("graftwork.as_peft", *program, site=site)
    assert result["library"] == "graftwork" and result["same"]
    assert result["losses"][-1] < result["losses"][0]
    if installed:  # the same program with the real peft
        theirs = run_program("quickstart.py", *program[1:])
        assert theirs["library"] == "peft"


def test_the_quickstart_runs_word_for_word_with_the_other_name(
    base_folder: Path, tmp_path: Path
) -> None:
    text = (HERE / "quickstart.py").read_text().replace("from peft import", "from graftwork import")
    (tmp_path / "program.py").write_text(text)
    result = run_program(str(tmp_path / "program.py"), str(base_folder), str(tmp_path / "lora"))
    assert result["library"] == "graftwork" and result["same"]


def run_module(module: str, *arguments: str, site: Path | None = None) -> Any:
    paths = [str(HERE.parent / "src"), str(HERE), *([str(site)] if site else [])]
    command = [sys.executable, *(["-S"] if site else []), "-m", module, *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_it_refuses_when_the_real_peft_is_there_already() -> None:
    pytest.importorskip("peft", reason="needs the real peft")
    code = """
import peft, graftwork
try:
    graftwork.as_peft()
except graftwork.GraftworkError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the real peft has been imported already" in done.stdout
    assert "python -m graftwork.as_peft" in done.stdout


def test_wrong_usage_of_the_runner_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graftwork.as_peft"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage:" in done.stderr


# -- names


def test_every_name_of_the_alias_is_there() -> None:
    for name, (where, ours) in NAMES.items():
        module = importlib.import_module(f"graftwork.{where}")
        assert getattr(module, ours) is not None, name
    assert shims.is_bnb_available() == (importlib.util.find_spec("bitsandbytes") is not None)


def test_what_peft_offers_for_lora_can_be_imported() -> None:
    peft: Any = pytest.importorskip("peft")
    every = vars(peft.helpers).items()
    own = {name for name, value in every if getattr(value, "__module__", "") == "peft.helpers"}
    offered = own | set(peft.tuners.lora.__all__) | {"Linear8bitLt", "Linear4bit", *INSTALLED}
    assert not {name for name in offered if name not in {*NAMES, *LAYER_NAMES["lora"]}}
    assert {"peft.helpers", "peft.tuners.lora.conversion"} <= MODULES


def test_hosts_are_pefts_layers_by_what_they_stand_for() -> None:
    config = LoraConfig(r=2, target_modules=["emb", "lin0", "conv1", "conv2", "conv3"])
    model = get_peft_model(build("plain"), config)
    names = {"Embedding": "emb", "Linear": "lin0", "Conv1d": "conv1", "Conv2d": "conv2",
             "Conv3d": "conv3", "Linear4bit": "", "ParamWrapper": ""}  # fmt: skip
    for name, path in names.items():
        kind = layer_class("lora", name)
        found = [p for p, m in model.get_base_model().named_modules() if isinstance(m, kind)]
        assert found == ([path] if path else []), name
    assert not isinstance(3, layer_class("lora", "Linear"))
    experts = LoraConfig(r=2, target_parameters=["gate_up_proj"], target_modules=["q_proj"])
    model = get_peft_model(build("mixtral"), experts)
    wrapper = layer_class("lora", "ParamWrapper")
    found = [p for p, m in model.named_modules() if isinstance(m, wrapper)]
    assert [p.rpartition(".")[2] for p in found] == ["experts", "experts"]
    parent, module, name = shims._get_submodules(build("plain"), "lin0")
    assert parent.lin0 is module and name == "lin0"
    assert shims.dequantize_module_weight(module) is module.weight
    assert shims.transpose(module.weight, True).shape == (16, 32)


# -- peft.helpers


@torch.no_grad()
def test_the_scale_of_low_rank_updates_is_changed_for_a_while() -> None:
    model, base = get_peft_model(build("llama"), LoraConfig(r=2)).eval(), build("llama")
    shake(model)
    want = run(model, "llama")
    with helpers.rescale_adapter_scale(model, 0.0):
        assert torch.equal(run(model, "llama"), run(base, "llama"))
    with pytest.raises(KeyError), helpers.rescale_adapter_scale(model, 2):
        assert not torch.allclose(run(model, "llama"), want)
        raise KeyError
    assert torch.equal(run(model, "llama"), want)
    with pytest.raises(TypeError, match="a number"), helpers.rescale_adapter_scale(model, "2"):
        pass
    other = get_peft_model(build("llama"), IA3Config())
    with pytest.raises(ValueError, match="has neither"), helpers.rescale_adapter_scale(other, 2):
        pass


def test_a_model_shows_the_signatures_of_its_base() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2)).eval()
    want = run(model, "llama")
    helpers.update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" in inspect.signature(model.generate).parameters
    twin = copy.deepcopy(model)
    shake(twin)
    assert torch.equal(run(model, "llama"), want) and not torch.equal(run(twin, "llama"), want)
    assert model.generate(input_ids=IDS, max_new_tokens=2, pad_token_id=0).shape == (2, 10)
    with pytest.raises(ValueError, match="forward, generate or all"):
        helpers.update_signature(model, "call")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_kappa_tune_chooses_as_in_peft(kind: str) -> None:
    peft: Any = pytest.importorskip("peft")
    options: Any = {"show_progress": False}
    theirs = peft.helpers.KappaTuneSelector(build(kind), **options)
    ours = helpers.KappaTuneSelector(build(kind), **options)
    for wish in ({"num_modules": 3}, {"top_p": 0.4}, {"threshold": 30.0}, {}):
        assert ours.get_best_targets(**wish) == theirs.get_best_targets(**wish)
        want = theirs.get_best_target_parameters(**wish)
        assert ours.get_best_target_parameters(**wish) == want
    found = helpers.find_kappa_target_modules(build(kind), max_dim_size_to_analyze=40)
    assert found == peft.find_kappa_target_modules(
        build(kind), max_dim_size_to_analyze=40, **options
    )
    get_peft_model(build(kind), LoraConfig(r=2, **found))


def test_helpers_that_change_nothing_can_be_used() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, use_dora=True)).eval()
    want = run(model, "llama")
    with helpers.DoraCaching(), helpers.disable_input_dtype_casting(model):
        assert torch.equal(run(model, "llama"), want)
    helpers.DoraCaching()(enabled=False)


class Base:
    """What a Trainer does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Copied:
    """PEFT's mixin as programs have copied it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)  # type: ignore[misc]
        for module in model.modules():
            if isinstance(module, graftwork.Grafted):  # peft's LoraModel
                loss = loss + module._get_monteclora_loss()
        return (loss, outputs) if return_outputs else loss


def test_the_mixin_for_trainers_counts_a_penalty_once() -> None:
    config = LoraConfig(r=2, monteclora_config={"kl_loss_weight": 0.1, "sample_scaler": 0.0})
    batch, losses = {"input_ids": IDS, "labels": IDS}, []
    for bases in ((Base,), (helpers.MontecloraTrainerMixin, Base), (Copied, Base)):
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), config).train()
        losses.append(float(type("Own", bases, {})().compute_loss(model, batch).detach()))
    assert losses[0] == losses[1] == losses[2] > float(build("llama")(**batch).loss.detach()) + 0.1
