"""Programs written for PEFT do the same under ``as_peft()``: run with both, and compared.

What differs on purpose is listed here, with its reason.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftwork.interop.names import REFUSED

HERE = Path(__file__).parent
IN_PEFT = {"TargetError": "NoMatchingPeftModuleError", "GraftworkError": "PeftError"}


def both(script: str, *arguments: str) -> list[Any]:
    """What a script prints with the real peft, and then under the alias."""
    pytest.importorskip("peft", reason="the real peft is the oracle of these tests")
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    found = []
    for which in ("peft", "alias"):
        command = [sys.executable, str(HERE / script), which, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


# -- names

# imported by PEFT from elsewhere, not its own
BORROWED = {
    "peft.helpers": ["bnb"],
    "peft.mapping": ["TYPE_CHECKING"],
    "peft.mapping_func": ["TYPE_CHECKING"],
    "peft.optimizers.loraplus": ["Embedding"],
    "peft.utils.hotswap": ["Conv2d", "Linear"],
}
# classes of which the engine makes the instances; programs ask isinstance, or subclass nothing
MADE_BY_THE_ENGINE = {
    "CPTEmbedding", "PromptEmbedding", "PromptEncoder", "MultitaskPromptEmbedding",
    "AdaptedAttention", "AuxiliaryTrainingWrapper", "TrainableTokensWrapper",
    "ModulesToSaveWrapper", "BufferDict", "LycorisConfig",
}  # fmt: skip
# (name, argument) -> why its default is another
DEFAULTS = {
    ("LoraConfig", "runtime_config"): "None means the default, which is not saved",
    ("AdaLoraConfig", "runtime_config"): "None means the default, which is not saved",
    ("XLoraConfig", "adapters"): "an empty dictionary means none",
    ("PeftModelForTokenClassification", "peft_config"): "PEFT has no default that works",
    ("delete_adapter", "layer_cls"): "every host is of one class",
    ("set_adapter", "layer_cls"): "every host is of one class",
}
# name -> why ours holds more, or names other classes
VALUES = {
    "PromptTuningInit": "LABELS is beyond PEFT",
    "PEFT_TYPE_TO_TUNER_MAPPING": "the classes of prompts have other names of their own",
    "TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING": "three architectures more",
}


@pytest.mark.slow
@pytest.mark.fault("J1")
def test_the_names_of_peft_are_here(tmp_path: Path) -> None:
    theirs, ours = both("imports_program.py", str(tmp_path / "names.json"))
    wrong, count, refused = [], 0, set()
    for module, names in theirs.items():
        if names.pop("__all__") != ours[module].pop("__all__"):
            wrong.append(f"{module}.__all__")
        for name, fact in names.items():
            count += 1
            mine = ours[module][name]
            if mine["kind"] == "absent":
                assert module in mine["why"] and "graftwork" in mine["why"]
                if name in REFUSED:
                    refused.add(name)
                elif name not in BORROWED.get(module, ()):
                    wrong.append(f"{module}.{name}: {mine['why']}")
            else:
                wrong += [f"{module}.{name}: {what}" for what in unlike(name, fact, mine)]
    assert not wrong, "\n".join(wrong[:40])
    assert count > 2000 and len(refused) > 100
    # what is refused is refused: an entry of a name that is here would be out of date
    assert len(REFUSED) - len(refused) < 10


def unlike(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> list[Any]:
    """In what a name is not what it is in PEFT."""
    if theirs["kind"] != ours["kind"]:
        return [ours["kind"]]
    if name in VALUES:
        for key in ("value", "members"):
            if key in theirs:
                assert set(theirs[key]) <= set(ours[key]), name
    elif theirs.get("value") != ours.get("value") or theirs.get("members") != ours.get("members"):
        return [ours.get("value")]
    missing = set(theirs.get("bases", ())) - set(ours.get("bases", ()))
    if name not in MADE_BY_THE_ENGINE and theirs.get("arguments") and ours.get("arguments"):
        return [*missing, *uncallable(name, theirs["arguments"], ours["arguments"])]
    return [*missing]


def uncallable(name: str, theirs: list[list[Any]], ours: list[list[Any]]) -> list[Any]:
    """Arguments that a call for PEFT may have and that mean something else here."""
    kinds = {kind for _, kind, _ in ours}
    mine = {argument: default for argument, _, default in ours}
    order = [a for a, kind, _ in ours if kind.startswith("POSITIONAL")]
    wrong: list[Any] = []
    for i, (argument, kind, default) in enumerate(theirs):
        if kind.startswith("VAR"):
            continue
        if argument not in mine:
            wrong += [argument] if "VAR_KEYWORD" not in kinds else []
            continue
        known = (name, argument) in DEFAULTS
        if default not in ("<required>", mine[argument]) and not known:
            wrong.append((argument, default, mine[argument]))
        if kind.startswith("POSITIONAL") and order and not name.endswith("Config"):
            if order[i : i + 1] != [argument] and "VAR_POSITIONAL" not in kinds:
                wrong.append((argument, i, order))
    names = {argument for argument, _, _ in theirs}
    needed = [a for a, kind, d in ours if d == "<required>" and not kind.startswith("VAR")]
    return wrong + [a for a in needed if a not in names]


# -- programs

# program -> what is left out of the comparison, and why
LEFT = {
    # where an option of GLoRA is "none" PEFT stores a tensor of zeros
    "names_in_state_dicts": "zeros",
}
# methods of PEFT's classes that programs have no use for
UNUSED = {
    "LoraModel.subtract_mutated_init": "starts are subtracted by the engine",
    "PeftMixedModel.set_modules_to_save": "PEFT's own step of an injection",
}
# methods that instances have, through the wrapped model
THROUGH = ("prepare_inputs_for_generation", "merge_and_unload", "unload")


@pytest.mark.slow
@pytest.mark.fault("I5")
@pytest.mark.fault("J2")
@pytest.mark.fault("C4")
def test_programs_do_what_they_do_with_peft() -> None:
    theirs, ours = both("harness.py")
    wrong = []
    for name, want in theirs["results"].items():
        got = ours["results"][name]
        texts = [found(want), found(got)]
        for phrase in theirs["phrases"][name]:
            assert any(phrase in text for text in texts[0]), f"{name}: PEFT does not say {phrase!r}"
            if not any(phrase in text for text in texts[1]):
                wrong.append(f"{name}: does not say {phrase!r} but {texts[1]}")
        wrong += [f"{name}: {what}" for what in judged(want, got, theirs["phrases"][name])]
        for difference in differences(want["value"], got["value"]):
            if not allowed(name, difference):
                wrong.append(f"{name}: {difference}")
    assert not wrong, "\n".join(wrong[:40])
    assert len(theirs["results"]) > 80


def found(result: dict[str, Any]) -> list[str]:
    """The texts of an error and of warnings."""
    error = [result["error"][1]] if result["error"] else []
    return error + [text for _, text in result["warnings"]]


def judged(want: dict[str, Any], got: dict[str, Any], phrases: list[str]) -> list[Any]:
    """Whether an error, and warnings that say a phrase, are of PEFT's classes."""
    if bool(want["error"]) != bool(got["error"]):
        return [want["error"] or got["error"]]
    wrong: list[Any] = []
    if want["error"]:
        mine = {IN_PEFT.get(kind, kind) for kind in got["error"][0]}
        wrong += [kind for kind in want["error"][0] if kind not in mine]
    for phrase in phrases:
        for kinds, text in want["warnings"]:
            same = [mine for mine, own in got["warnings"] if phrase in own]
            if phrase in text and not any(set(kinds) <= set(mine) for mine in same):
                wrong.append((phrase, kinds, same))
    return wrong


def differences(want: Any, got: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Places at which two results differ; numbers by more than a little."""
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in (want, got)]
    if all(numbers):
        near = math.isclose(want, got, rel_tol=2e-3, abs_tol=2e-3)
        return [] if near else [(where, want, got)]
    if isinstance(want, dict) and isinstance(got, dict):
        keys = dict.fromkeys([*want, *got])
        pairs = [(f"{where}.{k}", want.get(k, "absent"), got.get(k, "absent")) for k in keys]
    elif isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(want, got, strict=True))]
    else:
        return [] if want == got else [(where, want, got)]
    return [d for at, one, two in pairs for d in differences(one, two, at)]


def allowed(name: str, difference: tuple[str, Any, Any]) -> bool:
    """Whether a difference is one of those that are listed."""
    where, want, got = difference
    if name == "methods_exist":
        method = where.removeprefix(".")
        return want == "absent" or method in UNUSED or method.endswith(THROUGH)
    return name in LEFT and LEFT[name] in where and got == "absent"
