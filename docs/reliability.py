"""Write docs/reliability.md: ``python docs/reliability.py``.

Its table follows from docs/faults.yaml and from the tests' markers, ``@pytest.mark.fault("A1")``;
its figures from docs/reliability.json, which the programs named there wrote.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
PAGE, FAULTS, FIGURES = (
    HERE / f"{n}" for n in ("reliability.md", "faults.yaml", "reliability.json")
)
REPOSITORIES = {
    "AgileRL": "AgileRL/AgileRL",
    "AutoGPTQ": "AutoGPTQ/AutoGPTQ",
    "DeepSpeed": "deepspeedai/DeepSpeed",
    "GPTQModel": "ModelCloud/GPTQModel",
    "LLaMA-Factory": "hiyouga/LLaMA-Factory",
    "LyCORIS": "KohakuBlueleaf/LyCORIS",
    "adapters": "adapter-hub/adapters",
    "axolotl": "axolotl-ai-cloud/axolotl",
    "bitsandbytes": "bitsandbytes-foundation/bitsandbytes",
    "colpali": "illuin-tech/colpali",
    "llama.cpp": "ggml-org/llama.cpp",
    "lorax": "predibase/lorax",
    "mergekit": "arcee-ai/mergekit",
    "unsloth": "unslothai/unsloth",
    "vllm": "vllm-project/vllm",
}  # the others are huggingface's
HEAD = """# What cannot go wrong unseen

Most complaints about libraries of this kind are about silence: an adapter is attached, loaded,
trained, merged or exported without an error, and the result is the base model, or wrong weights.
Below is what users of others have met, with threads of public trackers as examples, what happens
here instead, and the tests that show it. All of them run in the continuous integration. What an
error says and what to do then: [troubleshooting](troubleshooting.md).

## Figures

{figures}

## Faults

{count} of them.

{faults}"""


def marked() -> dict[str, list[tuple[str, Path]]]:
    """The tests that show each fault handled."""
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    found[ast.literal_eval(mark.args[0])].append((node.name, path))  # type: ignore[attr-defined]
    return found


def page() -> str:
    """The text of docs/reliability.md.

    Raises:
        SystemExit: a fault has no test, or a test is marked with a fault that is not in the table.
    """
    sections = yaml.safe_load(FAULTS.read_text(encoding="utf-8"))
    tests = marked()
    names = {name for section in sections for name in section["rows"]}
    if lacking := sorted(names - set(tests)):
        raise SystemExit(f"no test is marked with {lacking} of faults.yaml")
    if unknown := sorted(set(tests) - names):
        raise SystemExit(f"tests are marked with {unknown}, which faults.yaml does not have")
    parts = []
    for section in sections:
        rows = [_row(name, fault, tests[name]) for name, fault in section["rows"].items()]
        head = ["| | users met | here | shown by |", "|---|---|---|---|"]
        parts.append("\n".join([f"### {section['section']}", "", *head, *rows, ""]))
    return HEAD.format(figures=_figures(), count=len(names), faults="\n".join(parts))


def _row(name: str, fault: dict[str, str], tests: list[tuple[str, Path]]) -> str:
    threads = ", ".join(_thread(t) for t in fault["threads"].split(", ") if t)
    shown = ", ".join(
        f"[{test.removeprefix('test_')}](../{path.relative_to(TESTS.parent)})"
        for test, path in tests
    )
    return f"| {name} | {fault['met']}{threads and f' ({threads})'} | {fault['here']} | {shown} |"


def _thread(thread: str) -> str:
    name, _, number = thread.partition("#")
    repository = name if "/" in name else REPOSITORIES.get(name, f"huggingface/{name}")
    return f"[{thread}](https://github.com/{repository}/issues/{number})"


def _figures() -> str:
    figures: list[dict[str, Any]] = json.loads(FIGURES.read_text(encoding="utf-8"))
    rows = [f"| {f['what']} | {f['number']} | `{f['by']}` |" for f in figures]
    return "\n".join(["| | | by |", "|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
