"""Reading data, from files or the hub, and setting a part of it aside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import did_you_mean
from .recipe import RecipeError

# tsv as IANA defines it: no quotes; "NA" and "null" are words like any other
TABLE = {"keep_default_na": False, "na_filter": False}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", TABLE),
    ".tsv": ("csv", {**TABLE, "sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
NO_ROWS = "{} has no rows below its heading; is the right file named?"
TEST_NAMES = ("test", "validation", "valid", "dev", "eval", "val")


def load(source: str, subset: str | None = None) -> dict[str, Any]:
    """A data set as ``{"train": rows}``, with ``"test"`` where it brings a held-out part.

    Args:
        source: a file, a folder or a hub id.
        subset: the configuration of a hub data set.

    Raises:
        RecipeError: there is no such data, it is empty, or it cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        parts = {"train": _read([path])}
    elif path.is_dir():
        parts = _folder(path)
    else:
        parts = _hub(source, subset, path)
    for rows in parts.values():
        if not len(rows):
            raise RecipeError(NO_ROWS.format(source))
    return parts


def load_rows(source: str, subset: str | None = None) -> Any:
    """The held-out part of a data set that has parts, and all rows of one that has not."""
    parts = load(source, subset)
    return parts.get("test", parts["train"])


def _read(files: Sequence[Path]) -> Any:
    import datasets

    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise RecipeError(
            f"{files[0].parent} mixes {', '.join(sorted(suffixes))}; keep one kind, or name a file"
        )
    suffix = suffixes.pop()
    if suffix not in READERS:
        raise RecipeError(
            f"{files[0].name} ends in {suffix or 'nothing'}; data is read from "
            f"{', '.join(READERS)}, a folder of them, or the hub"
        )
    if empty := [file for file in files if not file.stat().st_size]:
        raise RecipeError(f"{empty[0]} is empty (0 bytes)")
    if suffix in (".csv", ".tsv") and not any(_lines(file) > 1 for file in files):
        raise RecipeError(NO_ROWS.format(files[0]))
    kind, options = READERS[suffix]
    names = [str(file) for file in files]
    return _tried(
        lambda: datasets.load_dataset(kind, data_files=names, split="train", **options), files[0]
    )


def _lines(file: Path) -> int:
    """How many lines a file has, or two where it has more."""
    with open(file, "rb") as opened:
        return sum(1 for _ in zip(range(2), filter(bytes.strip, opened), strict=False))


def _tried(read: Callable[[], Any], what: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return read()
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(cause).strip() or type(cause).__name__
        raise RecipeError(f"{what} cannot be read: {text}") from error


def _folder(path: Path) -> dict[str, Any]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        found = _tried(lambda: datasets.load_from_disk(str(path)), path)
        return _parts(found, str(path)) if isinstance(found, dict) else {"train": found}
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS)
    if not files:
        raise RecipeError(f"{path} holds no data file; looked for {', '.join(READERS)}")
    held = [p for p in files if _words(p) & set(TEST_NAMES)]
    train = [p for p in files if "train" in _words(p)] or [p for p in files if p not in held]
    if not train:
        raise RecipeError(
            f"{path} holds only test files ({held[0].name}, ...); name a file to train on"
        )
    name = next((n for n in TEST_NAMES if any(n in _words(p) for p in held)), None)
    parts = {"train": _read(train)}
    if name is not None:
        parts["test"] = _read([p for p in held if name in _words(p)])
    return parts


def _words(path: Path) -> set[str]:
    return set(path.stem.lower().replace("-", "_").replace(".", "_").split("_"))


def _hub(source: str, subset: str | None, path: Path) -> dict[str, Any]:
    import datasets

    looks_local = path.suffix.lower() in READERS or source.count("/") != 1 or source[0] in "./~"
    if looks_local:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f"; there is no folder {path.parent} either"
        raise RecipeError(f"there is no data at {source}{where}{did_you_mean(path.name, siblings)}")
    found = _tried(lambda: datasets.load_dataset(source, subset), f"the hub's data set {source}")
    return _parts(found, source)


def _parts(found: Any, source: str) -> dict[str, Any]:
    if "train" not in found:
        raise RecipeError(f"{source} has no part called train; it has {', '.join(found)}")
    test = next((n for n in TEST_NAMES if n in found and _labelled(found[n])), None)
    return {"train": found["train"], **({"test": found[test]} if test else {})}


def _labelled(rows: Any) -> bool:
    """Whether the answers are there: benchmarks hide them as -1 in their test part."""
    head = rows[: min(len(rows), 50)]
    return not any(set(map(str, column)) == {"-1"} for column in head.values())


def split(
    count: int, share: float, seed: int, classes: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to hold out, the same for the same seed.

    Args:
        count: number of rows.
        share: share to hold out, at least one row.
        seed: decides which.
        classes: each row's class; every class keeps a row to train on, and gives its share.

    Returns:
        Two sorted lists of row numbers.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    groups: dict[int, list[int]] = {}
    for row in range(count):
        groups.setdefault(classes[row] if classes is not None else 0, []).append(row)
    held: list[int] = []
    for _, rows in sorted(groups.items()):
        order = random.permutation(len(rows))
        held += [rows[i] for i in order[: min(round(len(rows) * share), len(rows) - 1)]]
    if not held and count > 1:
        largest = max(groups.values(), key=len)
        held = [largest[int(random.integers(len(largest)))]]
    out = set(held)
    return [row for row in range(count) if row not in out], sorted(out)


def draw(count: int, wanted: int | None, seed: int) -> list[int]:
    """``wanted`` of ``count`` row numbers, sorted; all where None."""
    import numpy as np

    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())


def fingerprint(rows: Any) -> str:
    """A digest of rows, by which a later reader sees that data has changed."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(sorted(row.items(), key=lambda item: item[0])).encode())
    return digest.hexdigest()[:16]
