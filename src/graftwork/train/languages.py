"""The demo's material: names in many languages, from the Unicode CLDR data that Babel carries.

A sample is a few names in one language, such as "Ruotsi, Ranskan frangi"; its label is the
language. What is tested is never trained on: a name is held out by its key, such as the territory
SE, in all languages at once, and a string that training has seen is left out of the test.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .recipe import RecipeError

# languages of many families in scripts that an English vocabulary has letters for; of near-equal
# written standards (Norwegian's two, Croatian and its sisters) one
LANGUAGES = (
    "af ar az be bg bn br ca cs cy da de el en eo es et eu fa fi fil fr ga gd gl he hi hr hu hy id "
    "is it ja ka kk ko lt lv mk mn mt mi nl pl pt ro ru sk sl so sq sv sw tr uk uz vi yo zu"
).split()
NAMES = ("territories", "languages", "currencies", "scripts")
PARTS = 2  # names in a sample
SHARED = 3  # a name written alike in more languages than this tells little
HELD_OUT = 6  # one key of so many is held out


def names(code: str) -> dict[str, str]:
    """The names of one language by CLDR key, such as ``territories:SE``.

    Args:
        code: the language's code.

    Raises:
        RecipeError: Babel is not installed.
    """
    try:
        from babel import Locale
        from babel.units import get_unit_name
    except ModuleNotFoundError as error:
        raise RecipeError(
            "the demo needs Babel's names; install it with `pip install babel`"
        ) from error
    locale = Locale.parse(code)
    found = {f"{kind}:{key}": name for kind in NAMES for key, name in getattr(locale, kind).items()}
    found |= {f"months:{key}": name for key, name in locale.months["format"]["wide"].items()}
    found |= {f"days:{key}": name for key, name in locale.days["format"]["wide"].items()}
    units = {key: get_unit_name(key, "long", locale) for key in locale.unit_display_names}
    found |= {f"units:{key}": name for key, name in units.items()}
    return {key: name for key, name in found.items() if isinstance(name, str) and name.strip()}


def english(code: str) -> str:
    """The English name of a language."""
    from babel import Locale

    return str(Locale.parse(code).english_name)


def pools(codes: list[str], seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """For each language, the names to train on and the names to test with.

    Args:
        codes: the languages.
        seed: decides which keys are held out.

    Returns:
        Two dictionaries from a language's English name to its names; no string is in both.
    """
    every = {code: names(code) for code in codes}
    spread = Counter(name.casefold() for found in every.values() for name in set(found.values()))
    keys = sorted({key for found in every.values() for key in found})
    random.Random(seed).shuffle(keys)
    held = set(keys[: len(keys) // HELD_OUT])
    train, test = _parted(every, spread, held)
    seen = {name.casefold() for known in train.values() for name in known}
    return train, {
        lang: [n for n in known if n.casefold() not in seen] for lang, known in test.items()
    }


def _parted(
    every: Mapping[str, Mapping[str, str]], spread: Counter[str], held: set[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for code, found in every.items():
        telling = {k: n for k, n in sorted(found.items()) if spread[n.casefold()] <= SHARED}
        train[english(code)] = [n for k, n in telling.items() if k not in held]
        test[english(code)] = [n for k, n in telling.items() if k in held]
    return train, test


def samples(pool: Mapping[str, list[str]], count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of a few names with their language, all languages equally often."""
    draw = random.Random(seed)
    languages = sorted(pool)
    out = []
    for i in range(count):
        language = languages[i % len(languages)]
        out.append((", ".join(draw.sample(pool[language], PARTS)), language))
    draw.shuffle(out)
    return out


def write(folder: Path, train: int, test: int, seed: int) -> None:
    """Write ``train.tsv`` and ``test.tsv``; the labels are the languages' English names.

    Args:
        folder: where to; made where it is missing.
        train: samples to train on.
        test: samples to test with.
        seed: decides everything.
    """
    known, unknown = pools(LANGUAGES, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pool, count in (("train", known, train), ("test", unknown, test)):
        lines = [f"{text}\t{label}" for text, label in samples(pool, count, seed)]
        content = "\n".join(["text\tlabel", *lines]) + "\n"
        (folder / f"{name}.tsv").write_text(content, encoding="utf-8")
