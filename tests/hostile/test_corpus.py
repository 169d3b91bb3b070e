"""The corpus of the fuzz targets, and changes of it: the part of fuzzing that needs no atheris."""

from __future__ import annotations

import warnings
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_targets import TARGETS, survive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(fuzz_targets.__file__).parent / "corpus"
SEEDS = {name: [p.read_bytes() for p in sorted((CORPUS / name).iterdir())] for name in TARGETS}
COUNT = {"settings": 150, "pattern": 150, "names": 150, "pickle": 200}  # the slower ones
READ = {  # what each takes, so that a target that refuses all is seen
    "config": 4, "header": 5, "names": 3, "index": 1, "card": 2, "settings": 2, "note": 1,
    "pattern": 6, "pickle": 2,
}  # fmt: skip
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"null",
    b"1e999",
    b"NaN",
    b"-1",
    b"\xff",
    b"\0",
    b"9" * 30,
    b"../",
    b"(a+)+",
    b"&a",
    b"*a",
    b"!!python/object:os.x",
    b"---\n",
]


@pytest.mark.fault("K4")
@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_breaks_nothing(target: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of pickles by other programs
        taken = [survive(target, data) for data in SEEDS[target]]
    assert sum(taken) >= READ[target], taken


def test_every_target_has_a_corpus() -> None:
    assert {p.name for p in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.fault("K4")
@pytest.mark.parametrize("target", TARGETS)
def test_changes_of_the_corpus_break_nothing(target: str) -> None:
    @settings(
        max_examples=COUNT.get(target, 300),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(SEEDS[target]), st.lists(CHANGES, min_size=1, max_size=4))
    def run(data: bytes, changes: list[tuple[float, float, bytes]]) -> None:
        for start, length, new in changes:
            at = int(start * len(data))
            data = data[:at] + new + data[at + int(length * 8) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            survive(target, data)

    run()


SHARE = st.floats(0, 1)
CHANGES = st.tuples(SHARE, SHARE, st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6)))
