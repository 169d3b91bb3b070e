"""Write the parts of these pages that follow from the code: ``python docs/tables.py``."""

from __future__ import annotations

from pathlib import Path

from graftwork.train.recipe import DATA, FIELDS, LEARNING, MACHINE, WHAT, group_of

HERE = Path(__file__).parent


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
    return {path: written(path.read_text(encoding="utf-8"), "keys", keys())}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
