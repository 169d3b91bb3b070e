"""Write the parts of these pages that follow from the code: ``python docs/tables.py``.

With ``--count`` also docs/methods.json: the parameters that each method trains in a Llama-2-7B.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from graftwork import METHODS, capabilities
from graftwork.config import OPTIONAL, PeftConfig, TargetConfig
from graftwork.train.recipe import DATA, FIELDS, LEARNING, MACHINE, WHAT, group_of

HERE = Path(__file__).parent
FOLDER = HERE / "methods"
COUNTS = HERE / "methods.json"
MODELS = {  # of the examples: config class, model class
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "bert": ("BertConfig", "BertForMaskedLM"),
}
EXAMPLE = """```python
import torch
from transformers import {shape}, {model}

from graftwork import {names}

sizes = {{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}}
config = {shape}(**sizes, num_hidden_layers=2, num_attention_heads=4)


def base():
    torch.manual_seed(0)
    return {model}(config)


ids = torch.randint(0, 64, (2, 8))
batch = {{"input_ids": ids, "labels": ids{call}}}
model = get_peft_model(base(), {config}({options}))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model(**batch).loss.backward()
optimizer.step()

model.eval().save_pretrained("{folder}")
again = PeftModel.from_pretrained(base(), "{folder}").eval()
torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
```
"""


def told() -> dict[str, dict[str, Any]]:
    """What does not follow from the code, by method."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "methods.yaml").read_text("utf-8"))
    return found


def page_name(name: str) -> str:
    return f"{name.lower().replace('_', '-')}.md"


def own_fields(kind: type[PeftConfig]) -> str:
    """A config's own fields: name, default, and the comment behind it in the source."""
    shared = OPTIONAL | {f.name for f in fields(TargetConfig)}
    text = inspect.getsource(kind)
    lines = []
    for f in fields(kind):
        if f.name in shared:
            continue
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found = re.search(rf"^    {f.name}: [^#\n]*(?:#(.*))?$", text, re.M)
        comment = ((found and found.group(1)) or "").strip()
        comment = re.sub(r"^noqa: \w+ - (PEFT's name; )?", "", comment).replace("|", "\\|")
        lines.append(f"| `{f.name}` | `{default}` | {comment} |")
    head = ["| field | default | |", "|---|---|---|"]
    return "\n".join(head + lines) if lines else "It has no fields of its own."


def cells(name: str) -> str:
    """What the matrix says of a method, in words."""
    row = capabilities.load()["ours"].get(name)
    if row is None:
        return "It has tests of its own instead of a row in the matrix.\n"
    text = f"Measured: {', '.join(c for c, v in row.items() if v == 'yes')}.\n"
    for reason in dict.fromkeys(v for v in row.values() if v.startswith("impossible")):
        which = ", ".join(c for c, v in row.items() if v == reason)
        text += f"\nImpossible, since {reason.partition(': ')[2]}: {which}.\n"
    return text


def method_page(name: str) -> str:
    """The page of one method."""
    row, facts = METHODS[name], told()[name]
    count = json.loads(COUNTS.read_text(encoding="utf-8")).get(name)
    kind = row.config
    where = import_module(row.where.partition(":")[0])
    if not (where.__doc__ or "").strip() or name == "LORA":
        where = import_module("graftwork.methods.lora")
    paper = row.paper
    if paper[:1].isdigit():
        paper = f"[arXiv {paper}](https://arxiv.org/abs/{paper})"
    lines = [f"# {name}", "", (where.__doc__ or "").strip(), ""]
    lines += [f"**When.** {facts['when']}", ""]
    if paper:
        lines += [f"**Paper.** {paper}", ""]
    if count:
        lines += [f"**Parameters** trained in a Llama-2-7B with its defaults: {count:,}.", ""]
    lines += [f"## `{kind.__name__}`", "", own_fields(kind), ""]
    lines += ["The fields that all methods share are in [the guide](../python.md).", ""]
    lines += ["## What it can do", "", cells(name)]
    if facts.get("example", True):
        shape, model = MODELS[facts.get("model", "llama")]
        example = EXAMPLE.format(
            shape=shape,
            model=model,
            names=", ".join([*sorted([kind.__name__, "PeftModel"]), "get_peft_model"]),
            call=f", {facts['call']}" if "call" in facts else "",
            config=kind.__name__,
            options=facts.get("options", ""),
            folder=name.lower(),
        )
        lines += ["## An example", "", example]
    return "\n".join(lines).rstrip() + "\n"


def index_page() -> str:
    """All methods, and the matrix."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    lines = [
        "# Methods",
        "",
        "| method | what it does | trained in a Llama-2-7B |",
        "|---|---|---|",
    ]
    for name, row in METHODS.items():
        count = f"{counts[name]:,}" if name in counts else ""
        lines.append(f"| [{name}]({page_name(name)}) | {row.about} | {count} |")
    lines += ["", "## What each can do, beside PEFT's", "", "```", capabilities.text(), "```", ""]
    return "\n".join(lines)


def count() -> dict[str, int]:
    """What each method trains in a Llama-2-7B, without its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from graftwork import get_peft_model

    shape = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    )  # fmt: skip
    needed = {"TRAINABLE_TOKENS": {"token_indices": [*range(8)]}, "C3A": {"block_size": 64}}
    needed["ADALORA"] = {"total_step": 1000}
    skipped = ("XLORA", "BITFIT", "ADAMSS")  # need LoRAs, biases, weights
    found = {}
    for name, row in METHODS.items():
        if name not in skipped:
            with torch.device("meta"):
                base = LlamaForCausalLM(shape)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(base, row.config(**needed.get(name, {})))
            found[name] = model.get_nb_trainable_parameters()[0]
    return found


def keys() -> str:
    """The keys of a recipe, a table for each group."""
    lines = []
    for group in (WHAT, DATA, LEARNING, MACHINE):
        lines += [f"| {group.lower()} | default | |", "|---|---|---|"]
        for name, field in FIELDS.items():
            if group_of(name) == group:
                plain = "" if field.default is None else f"`{field.default}`"
                default = "required" if field.is_required() else plain
                lines.append(f"| `{name}` | {default} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def written(page: str, name: str, content: str) -> str:
    """A page with ``content`` between the marks ``<!-- name -->`` and ``<!-- end -->``."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition("<!-- end -->")
    return f"{before}<!-- {name} -->\n{content}<!-- end -->{after}"


def pages() -> dict[Path, str]:
    """What the pages should hold."""
    path = HERE / "command-line.md"
    found = {path: written(path.read_text(encoding="utf-8"), "keys", keys())}
    found[FOLDER / "README.md"] = index_page()
    return found | {FOLDER / page_name(name): method_page(name) for name in METHODS}


if __name__ == "__main__":
    if "--count" in sys.argv:
        COUNTS.write_text(json.dumps(count(), indent=0) + "\n", encoding="utf-8")
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
