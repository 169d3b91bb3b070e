"""The plan: steps, and memory that is estimated within a factor of what training takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from graftwork.train import base, plan, show
from graftwork.train.prepare import prepare
from graftwork.train.recipe import RecipeError, build


def recipe(**settings: Any) -> Any:
    return build({"model": "m", "data": "d", **settings})[0]


def ready(**settings: Any) -> Any:
    return prepare(build({"precision": "fp32", **settings})[0], lambda text: None)


@pytest.mark.parametrize(
    ("settings", "samples", "wanted"),
    [
        ({"batch_size": 8}, 100, (13, 1.0)),
        ({"batch_size": 8, "epochs": 2.5}, 100, (33, 2.5)),
        ({"batch_size": 8, "gradient_accumulation": 4}, 100, (4, 1.0)),
        ({"batch_size": 8, "steps": 26}, 100, (26, 2.0)),
        ({"batch_size": 8, "epochs": 0.001}, 100, (1, 0.001)),
    ],
)
def test_steps_are_counted(settings: Any, samples: int, wanted: tuple[int, float]) -> None:
    assert plan.count_steps(recipe(**settings), samples) == wanted


def test_the_plan_names_what_is_trained(bert: Path, reviews: Path, tmp_path: Path) -> None:
    found = ready(model=bert, data=reviews, r=4, output=tmp_path / "out")
    made = found.plan
    assert made.trainable == sum(p.numel() for p in found.model.parameters() if p.requires_grad)
    assert 0 < made.share < 0.5 and made.places > 5 and made.head_rate is not None
    lines = dict(show.plan_lines(found))
    assert "120 to train, 40 held out (the test part of" in lines["data"]
    assert lines["method"].endswith("places (r=4)")
    assert "2 labels: bad, good" in lines["task"]
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


def test_dropout_and_attention_of_the_base_model(bert: Path, llama: Path, reviews: Path) -> None:
    found = ready(model=bert, data=reviews, base_dropout=0.25)
    dropouts = [m.p for m in found.model.get_base_model().modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) > 5 and set(dropouts) == {0.25}
    with pytest.raises(RecipeError, match="--base-dropout: a gemma has no dropout"):
        base.set_dropout(SimpleNamespace(to_dict=dict, model_type="gemma"), 0.1)
    for wanted, kernel in (("auto", "eager"), ("sdpa", "sdpa")):
        config = ready(model=bert, data=reviews, attention=wanted).model.config
        assert config._attn_implementation == kernel
    with pytest.raises(RecipeError, match=r"cannot be loaded: .*no_such_kernel"):
        ready(model=bert, data=reviews, attention="no_such_kernel")
    assert base.choose_attention("auto", base.SHORT + 1) == "auto"


def test_long_texts_and_a_limit_beyond_the_model(bert: Path, reviews: Path) -> None:
    found = ready(model=bert, data=reviews, max_length=5)
    assert found.remarks[0].startswith("120 training texts are longer than 5 tokens (the longest")
    with pytest.raises(RecipeError, match="--max-length: the base model takes at most 32 tokens"):
        ready(model=bert, data=reviews, max_length=33)


def test_too_little_memory_is_told_with_a_remedy(
    bert: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available", lambda device: 1000)
    found = ready(model=bert, data=reviews)
    assert "halve --batch-size and double --gradient-accumulation" in found.remarks[-1]


def test_checkpointing_and_smaller_batches_lower_the_estimate(llama: Path, answers: Path) -> None:
    def kept(**settings: Any) -> int:
        memory = ready(model=llama, data=answers, **settings).plan.memory
        return int(memory.activations)

    whole = kept(batch_size=16)
    assert kept(batch_size=8) == pytest.approx(whole / 2, rel=0.1)
    assert kept(batch_size=16, gradient_checkpointing=True) < whole / 2


MEASURE = """
import json, sys, threading, time
from pathlib import Path
import psutil
from train import toys
from graftwork.train.recipe import build
from graftwork.train.run import train
from graftwork.train.show import Silent

folder = Path(sys.argv[1])
text = " ".join("the a film plot actor scene was is and very".split() * 3)
texts = [(text, "good" if i % 2 else "bad") for i in range(96)]
toys.write_table(folder / "train.csv", texts, ("text", "label"))
model = toys.bert(
    folder / "base", hidden_size=256, num_hidden_layers=6, num_attention_heads=8,
    intermediate_size=1024,
)
warm, _ = build({"model": model, "data": folder / "train.csv", "steps": 1, "batch_size": 1,
                 "output": folder / "warm", "precision": "fp32"})
train(warm, Silent())
seen = [psutil.Process().memory_info().rss]
def watch():
    while True:
        seen.append(psutil.Process().memory_info().rss)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
recipe, _ = build({"model": model, "data": folder / "train.csv", "steps": 3, "batch_size": 64,
                   "output": folder / "out", "precision": "fp32"})
found = train(recipe, Silent())
memory = found.prepared.plan.memory
print(json.dumps({"grown": max(seen) - seen[0], "estimate": memory.total}))
"""


@pytest.mark.slow
def test_the_memory_estimate_is_within_a_factor_of_two(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    env = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(tests)}
    env["MALLOC_MMAP_THRESHOLD_"] = "100000"  # else glibc keeps most of what was freed
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, cwd=tests, check=True, env=env,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["grown"] / 2 < told["estimate"] < told["grown"] * 2, told


def test_sizes_and_times_are_readable() -> None:
    assert [show.size(n) for n in (0, 999, 1_500, 23_456_789, 2_340_000_000)] == [
        "0 bytes", "999 bytes", "1.5 kB", "23 MB", "2.3 GB",
    ]  # fmt: skip
    assert [show.clock(n) for n in (0.4, 61, 3661)] == ["0:00", "1:01", "1:01:01"]
