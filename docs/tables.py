"""Write the parts of these pages that follow from the code: ``python docs/tables.py``.

They are the pages of docs/methods/, and what stands in the README, in python.md and in
command-line.md between ``<!-- name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml

from graftwork import METHODS, capabilities
from graftwork.config import PeftConfig, TargetConfig
from graftwork.meaning import default_of, formula, meanings, own
from graftwork.table import CONFIGS
from graftwork.train.defaults import DEFAULTS, Defaults
from graftwork.train.recipe import DATA, FIELDS, LEARNING, MACHINE, WHAT, group_of

HERE = Path(__file__).parent
FOLDER = HERE / "methods"
COUNTS = HERE / "methods.json"
PARAMETERS = 6_738_415_616  # of a Llama-2-7B
MODELS = {  # of the examples: config class, model class
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "bert": ("BertConfig", "BertForMaskedLM"),
}
HEAD = """```python
import torch
from transformers import {shape}, {model}

from graftwork import {names}

sizes = {{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}}
shape = {shape}(**sizes, num_hidden_layers=2, num_attention_heads=4)


def base():
    torch.manual_seed(0)
    return {model}(shape)


ids = torch.randint(0, 64, (2, 8))
batch = {{"input_ids": ids, "labels": ids{call}}}
"""
EXAMPLE = """{before}model = get_peft_model({config})
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model(**batch).loss.backward()
optimizer.step()

model.eval().save_pretrained("{folder}")
again = PeftModel.from_pretrained(base(), "{folder}").eval()
torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
```
"""
TRAIN = """

def train(model, optimizer=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()
```
"""
GROUPS = {  # the areas of the matrix: title -> capabilities
    "What can be done with an adapter": "merge unmerge multi mixbatch disable hotswap weighted "
    "delete toLoRA Mixed native low_mem",
    "Where it can sit": "Linear Conv1d Conv2d Conv3d tfConv1D Embedding MHA tgt_params tied",
    "What its config can say": "overrides mod_to_save tok_idx layers_tt exclude",
}


def told(part: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What does not follow from the code, for each of these names.

    Raises:
        SystemExit: a name has no entry, or an entry no name.
    """
    path = HERE / "methods.yaml"
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))[part]
    names = list(names)
    if lacking := [name for name in names if not found.get(name, {}).get("when")]:
        raise SystemExit(f"docs/methods.yaml: {part} lacks {lacking}; say when to use it (`when:`)")
    if beyond := sorted(set(found) - set(names)):
        raise SystemExit(f"docs/methods.yaml: {part} has {beyond}, which the code does not have")
    return {name: found[name] for name in names}


def counted() -> dict[str, dict[str, Any]]:
    """docs/methods.json.

    Raises:
        SystemExit: a method is not in it.
    """
    found: dict[str, dict[str, Any]] = json.loads(COUNTS.read_text(encoding="utf-8"))
    if lacking := [name for name in METHODS if name not in found]:
        raise SystemExit(f"docs/methods.json lacks {lacking}; run: python docs/counts.py")
    return found


def para(text: str, indent: str = "") -> str:
    """A paragraph of lines of 98 columns at most."""
    return fill(text, 98, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def page_name(name: str) -> str:
    return f"{name.lower().replace('_', '-')}.md"


def cell(text: str) -> str:
    """Text inside a table."""
    return re.sub(r"<(?=\w)", r"\<", text.replace("|", "\\|").replace("``", "`"))


def field_table(kind: type[Any], names: Iterable[str]) -> str:
    """Fields of a config: name, default, meaning.

    Raises:
        SystemExit: a field is not explained.
    """
    means = meanings(kind)
    lines = ["| field | default | |", "|---|---|---|"]
    for f in fields(kind):
        if f.name in names:
            if f.name not in means:
                raise SystemExit(f"{kind.__name__}.{f.name}: say what it means behind it (# ...)")
            default = cell(f"`{default_of(f)!r}`")
            lines.append(f"| `{f.name}` | {default} | {cell(means[f.name])} |")
    return "\n".join(lines)


def shared_fields() -> str:
    """The fields of every method."""
    unset = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path"}
    return field_table(TargetConfig, {f.name for f in fields(TargetConfig)} - unset) + "\n"


def own_fields(kind: type[PeftConfig]) -> str:
    """A config's own fields."""
    bases: list[Any] = [c for c in kind.__mro__[1:] if c.__name__ in CONFIGS]
    parent = bases[0] if bases else TargetConfig
    more = {f.name for f in fields(kind)} - {f.name for f in fields(parent)}  # or of a plain base
    mine = {f.name for f in own(kind)} | more
    parts = [field_table(kind, mine)] if mine else []
    shared = {f.name for f in fields(TargetConfig)}
    if {f.name for f in fields(kind)} - shared - mine:
        page = page_name(CONFIGS[parent.__name__].name)
        parts.append(f"It also has the fields of [`{parent.__name__}`]({page}), where they apply.")
    also = "Other fields: " if mine else "It has no fields of its own, only "
    link = "[those of every method](../python.md#fields-of-every-method)."
    return "\n\n".join([*parts, also + link])


def trained(name: str) -> str:
    """How many parameters a method trains, and of which config."""
    count = counted()[name]
    if "why" in count:
        return f"**Parameters** in a Llama-2-7B: not counted, since {count['why']}."
    share = 100 * count["trained"] / PARAMETERS
    percent = f"{share:.2g}" if share > 0.001 else "below 0.001"
    text = f"**Parameters** in a Llama-2-7B: {count['trained']:,} ({percent} %)"
    return f"{text}, of `{METHODS[name].config.__name__}({count['options']})` at {count['at']}."


def doc_of(name: str) -> str:
    """The header of a method's file."""
    where = METHODS[name].where.partition(":")[0].removesuffix("_config")
    text = inspect.cleandoc(import_module(where).__doc__ or "")
    if not text:
        raise SystemExit(f"{where} has no docstring with its formula")
    return text


def title(name: str) -> str:
    """A method's name as its paper writes it."""
    return doc_of(name).partition("\n")[0].partition(" (")[0].partition(":")[0]


def method_page(name: str, facts: dict[str, Any]) -> str:
    """The page of one method."""
    row = METHODS[name]
    kind = row.config
    lines = [f"# {title(name)}", "", f"`{name}`: {row.about}.", "", doc_of(name), ""]
    lines += [para(f"**When.** {facts['when']}"), ""]
    if row.paper:
        number = row.paper[:1].isdigit()
        link = f"[arXiv {row.paper}](https://arxiv.org/abs/{row.paper})" if number else row.paper
        lines += [f"**Paper.** {link}", ""]
    lines += [para(trained(name)), "", f"## `{kind.__name__}`", ""]
    lines += [own_fields(kind), "", "## What it can do", ""]
    lines += [para(f"- {line}", "  ") for line in capabilities.told(name)]
    lines += ["", "[What the words mean](README.md#what-each-can-do).", ""]
    lines += ["## An example", "", example(name, facts)]
    return "\n".join(lines).rstrip() + "\n"


def example(name: str, facts: dict[str, Any]) -> str:
    """Attach, train one step, save, load."""
    shape, model = MODELS[facts.get("model", "llama")]
    config = METHODS[name].config.__name__
    classes = sorted({config, "PeftModel", *facts.get("names", "").split()})
    call = f", {facts['call']}" if "call" in facts else ""
    head = HEAD.format(
        shape=shape, model=model, names=", ".join([*classes, "get_peft_model"]), call=call
    )
    made = f"{config}({facts.get('options', '')})"
    made = f"base(), {made}" if len(made) <= 68 else f"\n    base(), {made}\n"  # 100 columns
    before = facts.get("before", "")
    return head + EXAMPLE.format(before=before, config=made, folder=name.lower())


def index_page() -> str:
    """All methods by family, and the matrix."""
    counts = counted()
    lines = [
        "# Methods",
        "",
        f"{len(METHODS)} methods. The last column is what each trains in a Llama-2-7B with its",
        "defaults, or with what its page says. There is a page for",
        "[LoRA's options, starts and optimizers](lora-options.md), and a guide to",
        "[a method of your own](../custom-methods.md).",
    ]
    family = None
    for name, row in METHODS.items():
        if row.family != family:
            family = row.family
            lines += ["", f"## {family[0].upper()}{family[1:]}", ""]
            lines += ["| method | what it does | trained |", "|---|---|---:|"]
        count = counts[name]
        number = f"{count['trained']:,}" if "trained" in count else ""
        lines.append(f"| [{title(name)}]({page_name(name)}) | {cell(row.about)} | {number} |")
    return "\n".join([*lines, "", matrix()])


def matrix() -> str:
    """The matrix, in three tables."""
    about = (
        f"{capabilities.summary()} In each cell graftwork's sign, then PEFT's: `+` yes, `~` in "
        f"part, `.` no, `x` impossible, `-` without a meaning or not there. {capabilities.STARTS} "
        "`graft methods --matrix` prints it."
    )
    lines = ["## What each can do", "", para(about)]
    rows = [row for names in capabilities.rows().values() for row in names]
    assert set(" ".join(GROUPS.values()).split()) == set(capabilities.MEANING)
    for title, words in GROUPS.items():
        columns = words.split()
        lines += ["", f"### {title}", ""]
        lines += [f"- `{c}`: {capabilities.MEANING[c]}" for c in columns]
        lines += ["", f"| | {' | '.join(columns)} |", f"|---|{':---:|' * len(columns)}"]
        for row in rows:
            signs = (capabilities.signs(row, c).replace(" ", "-") for c in columns)
            lines.append(f"| {row} | {' | '.join(f'`{pair}`' for pair in signs)} |")
    lines += ["", "### Impossible", "", "Each is refused by an error with this reason.", ""]
    for why, cells in capabilities.impossible().items():
        lines.append(para(f"- {why}: {', '.join(cells)}", "  "))
    return "\n".join(lines) + "\n"


def option_names() -> dict[str, list[str]]:
    """LoRA's variants, starts and optimizers, by the names that the code has for them."""
    import graftwork
    from graftwork.inits import STARTS
    from graftwork.methods.lora_config import VARIANTS

    made = [n for n, home in graftwork._HOME.items() if home.startswith("optim.") and n.islower()]
    starts = [name for name in STARTS if name not in VARIANTS]
    return {"variants": ["use_rslora", *VARIANTS], "starts": starts, "optimizers": made}


def options_page() -> str:
    """LoRA's variants, starts and optimizers."""
    import graftwork

    lines = [
        "# LoRA's options, starts and optimizers", "",
        "All are fields of [`LoraConfig`](lora.md), or functions beside it. An adapter has one",
        "start, and at most one variant. Everything below runs behind this head:", "",
        HEAD.format(shape="LlamaConfig", model="LlamaForCausalLM", call="",
                    names="LoraConfig, get_peft_model").rstrip() + "\n" + TRAIN,
    ]  # fmt: skip
    for part, names in option_names().items():
        entries = told(part, names)
        lines += [f"## {part.capitalize()}", "", "| | how | formula |", "|---|---|---|"]
        for key, facts in entries.items():
            title, how = facts.get("name", key), how_to_ask(part, key)
            lines.append(f"| {title} | `{how}` | {cell(option_formula(part, key, facts))} |")
        for key, facts in entries.items():
            lines += ["", f"### {facts.get('name', key)}", "", para(facts["when"]), ""]
            if "options" in facts:
                kind = getattr(graftwork, facts["options"])
                given = {f.name for f in fields(kind) if f.init}
                lines += [f"`{kind.__name__}`:", "", field_table(kind, given), ""]
            lines += ["```python", facts["code"].rstrip(), "```"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def how_to_ask(part: str, key: str) -> str:
    """What the user writes."""
    if part == "optimizers":
        return f"{key}(...)"
    if part == "starts" or key == "mica":
        value = key.capitalize() if key in ("true", "false") else f'"{key}"'
        return f"init_lora_weights={value}"
    default = next(default_of(f) for f in fields(CONFIGS["LoraConfig"].config) if f.name == key)
    return f"{key}=True" if default is False else f"{key}=..."


def option_formula(part: str, key: str, facts: dict[str, Any]) -> str:
    """The first paragraph of the docstring where it is computed."""
    from graftwork.inits import STARTS
    from graftwork.methods.lora_config import VARIANTS

    if "formula" in facts:
        return str(facts["formula"])
    if part == "variants":
        module = f"graftwork.methods.{VARIANTS[key].partition(':')[0]}"
    elif part == "optimizers":
        module = getattr(import_module("graftwork"), key).__module__
    elif find_spec(f"graftwork.inits.{key}"):
        module = f"graftwork.inits.{key}"
    else:
        return formula(STARTS[key].factors.__doc__)
    return formula(import_module(module).__doc__)


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


def rates() -> str:
    """What the command line trains each method with, where the user says nothing."""
    usual = Defaults()
    lines = [
        "| method | rate, classifying | language | of a new head | base's dropout | options |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in [*DEFAULTS.items(), ("the others", usual)]:
        options = ", ".join(f"`{key}: {value}`" for key, value in row.options.items())
        shown = name if row is usual else f"`{name}`"
        lines.append(
            f"| {shown} | {row.rate:g} | {row.language_rate:g} | {row.head_rate:g} "
            f"| {'its own' if row.base_dropout is None else row.base_dropout} | {options} |"
        )
    return "\n".join(lines) + "\n"


def written(page: str, name: str, content: str) -> str:
    """A page with ``content`` between the marks ``<!-- name -->`` and ``<!-- end -->``."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    assert mark, f"<!-- {name} --> is missing"
    _, _, after = rest.partition("<!-- end -->")
    return f"{before}<!-- {name} -->\n{content}<!-- end -->{after}"


def pages() -> dict[Path, str]:
    """What the pages should hold."""
    entries = told("methods", METHODS)
    parts = {
        HERE / "command-line.md": {"keys": keys(), "rates": rates()},
        HERE / "python.md": {"shared": shared_fields()},
        HERE.parent / "README.md": {
            "methods": readme(),
            "matrix": para(capabilities.summary()) + "\n",
        },
    }
    found = {}
    for path, marks in parts.items():
        found[path] = path.read_text(encoding="utf-8")
        for name, content in marks.items():
            found[path] = written(found[path], name, content)
    found |= {FOLDER / "README.md": index_page(), FOLDER / "lora-options.md": options_page()}
    return found | {FOLDER / page_name(n): method_page(n, facts) for n, facts in entries.items()}


def readme() -> str:
    """The README's methods, by family, and the counts of the matrix."""
    rows: dict[str, list[str]] = {}
    for name, row in METHODS.items():
        rows.setdefault(row.family, []).append(title(name))
    for part, names in option_names().items():
        entries = told(part, names)
        rows[f"LoRA's {part}"] = [
            facts.get("name", key) for key, facts in entries.items() if key not in ("true", "false")
        ]
    lines = [f"{len(METHODS)} methods, and LoRA's options:", "", "| | |", "|---|---|"]
    lines += [f"| {family} | {', '.join(names)} |" for family, names in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
